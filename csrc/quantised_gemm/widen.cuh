// Numbers of 8 and 4 bits as 16-bit floating-point numbers, exactly and without a conversion: the bits of a number are
// put into the significand of 128 (bf16) or 1024 (fp16), from which one fma takes what was added. PTX ISA, "prmt",
// "lop3", "fma".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "moduleformer_ext/common.hpp"

namespace mfx::quantised {

// Byte c of the first word twice, then of the second: low and high half of a pair.
template <int c>
__device__ inline std::uint32_t byte_of_each(std::uint32_t first, std::uint32_t second) {
  return __byte_perm(first, second, c | c << 4 | (4 + c) << 8 | (4 + c) << 12);
}

template <typename T>
__device__ inline std::uint32_t add_pairs(std::uint32_t x, std::uint32_t y);
template <>
__device__ inline std::uint32_t add_pairs<BFloat16>(std::uint32_t x, std::uint32_t y) {
  // Not __hadd2(): sm_80 adds bf16 by way of fma.
  const __nv_bfloat162 sum = __hfma2(reinterpret_cast<const __nv_bfloat162&>(x), __float2bfloat162_rn(1.0f),
                                     reinterpret_cast<const __nv_bfloat162&>(y));
  return reinterpret_cast<const std::uint32_t&>(sum);
}
template <>
__device__ inline std::uint32_t add_pairs<Float16>(std::uint32_t x, std::uint32_t y) {
  const __half2 sum = __hadd2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
  return reinterpret_cast<const std::uint32_t&>(sum);
}

// Of each half of the pair its lower byte, a signed number.
template <typename T>
__device__ inline std::uint32_t bytes_to_pair(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // 128 has seven bits of significand; the eighth chooses between 128 and 256 to be taken away.
    return add_pairs<T>((pair & 0x007f007fu) | 0x43004300u, (pair & 0x00800080u) | 0xc300c300u);
  } else {
    return add_pairs<T>((pair & 0x00ff00ffu) ^ 0x64806480u, 0xe480e480u);  // 1024 + (n + 128) - 1152
  }
}

// Of the lower half's last four bits n0 + 8, and n1 in two's complement of the upper half's.
template <typename T>
__device__ inline std::uint32_t nibbles_to_pair(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return add_pairs<T>((pair & 0x000f000fu) ^ 0x43084300u, 0xc308c308u);  // 128 + (n + 8) - 136
  } else {
    return add_pairs<T>((pair & 0x000f000fu) ^ 0x64086400u, 0xe408e408u);  // 1024 + (n + 8) - 1032
  }
}

}  // namespace mfx::quantised
