// Shared-memory addresses as the 32-bit integers that PTX instructions take.
#pragma once

#include <cstdint>

namespace mfx::device {

using SharedAddress = std::uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of `kRowBytes` (128 or a multiple of it) per row,
// chunks being exchanged by XOR with the row, so that eight consecutive rows of one chunk column lie in distinct banks:
// what ldmatrix reads in one phase. The tile must be aligned to 128 bytes.
template <int kRowBytes>
__device__ constexpr std::uint32_t swizzled_offset(std::uint32_t row, std::uint32_t chunk) {
  static_assert(kRowBytes % 128 == 0, "a row fills all banks");
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace mfx::device
