// Tiles of keys in shared memory, and how products deal the keys to the lanes of a quad.
//
// A quad's lane c holds columns 2c and 2c + 1 of every 8-column tile j of a product. The scan wants each lane to own a
// run of consecutive keys: slot 8j + 2c + b of a product over 4 kRun keys is key c * kRun + 2j + b. Keys lie in natural
// order; the lanes' addresses deal them, so that a product may have the oldest 4 kRun keys of a tile alone, where a
// warp's rows see no others.
//
// Chunks of 16 bytes are exchanged by XOR with swizzle(key), which is linear over XOR and takes all eight values on the
// keys {0, 1} + {0, 1, 2, 3} * kRun that one phase of ldmatrix reads, whether kRun is 4, 8 or 16.
#pragma once

#include "device/tile_product.cuh"

namespace mfx {

__host__ __device__ constexpr std::uint32_t stick_key_swizzle(std::uint32_t key) {
  return key % 2 + (key / 4 ^ key / 16) % 4 * 2;
}

// As device::swizzled_offset().
template <int kRowBytes>
__host__ __device__ constexpr std::uint32_t stick_key_offset(std::uint32_t key, std::uint32_t chunk) {
  return key * kRowBytes + ((chunk ^ stick_key_swizzle(key)) << 4);
}

// The order of keys, for device::multiply_rows() and multiply_columns().
struct StickKeyOrder {
  static constexpr int kRowsOf16 = 4;
  static constexpr int bits(int step, int sixteen) { return device::step_bits(step ^ sixteen); }
};

// Lane's address in a tile for multiply_rows().
template <int kRowBytes, int kRun>
__device__ inline device::SharedAddress stick_key_rows(device::SharedAddress tile) {
  const std::uint32_t lane = threadIdx.x & 31;
  return tile + stick_key_offset<kRowBytes>((lane >> 1 & 3) * kRun + (lane & 1) + (lane >> 4) * 2, lane >> 3 & 1);
}

// Lane's address in a tile for multiply_columns().
template <typename Op, int kRowBytes, int kRun>
__device__ inline device::SharedAddress stick_key_columns(device::SharedAddress tile) {
  const std::uint32_t lane = threadIdx.x & 31;
  if constexpr (device::kIs16Bit<Op>) {
    return tile + stick_key_offset<kRowBytes>((lane >> 1 & 3) * kRun + (lane & 1) + (lane >> 3 & 1) * 2, lane >> 4);
  }
  return tile + stick_key_offset<kRowBytes>((lane & 3) * kRun, lane >> 4) + (lane >> 2 & 3) * 4;
}

// Calls take(n), n a constant, with the smallest of kTiles / 4, kTiles / 2 and kTiles tiles of 8 keys, the oldest of a
// tile, that has all that a warp's rows see. Its last row is the `row`th of those that see the oldest key of the tile,
// and every `group` rows see one more.
template <int kTiles, typename Take>
__device__ inline void stick_take_oldest(int row, int group, Take&& take) {
  if constexpr (kTiles >= 8) {
    if (row < 2 * kTiles * group) return take(std::integral_constant<int, kTiles / 4>{});
  }
  if constexpr (kTiles >= 4) {
    if (row < 4 * kTiles * group) return take(std::integral_constant<int, kTiles / 2>{});
  }
  take(std::integral_constant<int, kTiles>{});
}

}  // namespace mfx
