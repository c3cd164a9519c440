// Conversions between binary32 and the storage types. A pair of 16-bit numbers is one register, the first in the lower
// half.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "moduleformer_ext/common.hpp"

namespace mfx::device {

template <typename T>
__device__ std::uint32_t pack_pair(float low, float high);  // rounds to nearest even

template <>
__device__ inline std::uint32_t pack_pair<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

template <>
__device__ inline std::uint32_t pack_pair<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(BFloat16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}
__device__ inline float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

// Of bfloat16 one instruction each. PTX ISA, "Logic and shift instructions: shl, and". From __low2float() and
// __high2float() ptxas makes up to 4 % more instructions in the loops of attention.
template <typename T>
__device__ inline float low_of_pair(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair)});
}
template <>
__device__ inline float low_of_pair<BFloat16>(std::uint32_t pair) {
  float y;
  asm("shl.b32 %0, %1, 16;" : "=f"(y) : "r"(pair));
  return y;
}

template <typename T>
__device__ inline float high_of_pair(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}
template <>
__device__ inline float high_of_pair<BFloat16>(std::uint32_t pair) {
  float y;
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(y) : "r"(pair));
  return y;
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// To the nearest number of 11 significant bits, ties away from zero, as a binary32 register. PTX ISA, "Data movement
// and conversion instructions: cvt". The toolkit's __float_to_tf32() comes with all of mma.h.
__device__ inline std::uint32_t to_tf32(float x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace mfx::device
