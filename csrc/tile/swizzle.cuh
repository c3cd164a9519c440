// Where a tile in shared memory has its chunks of 16 bytes.
#pragma once

#include "ptx/shared_address.cuh"

namespace mfx::device {

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of `kRowBytes` (128 or a multiple of it) per row,
// chunks being exchanged by XOR with the row, so that eight consecutive rows of one chunk column lie in distinct banks:
// what ldmatrix reads in one phase. The tile must be aligned to 128 bytes.
template <int kRowBytes>
__device__ constexpr std::uint32_t swizzled_offset(std::uint32_t row, std::uint32_t chunk) {
  static_assert(kRowBytes % 128 == 0, "a row fills all banks");
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace mfx::device
