// Tiles of keys in shared memory, and how products interleave them over the lanes of a quad.
//
// A quad's lane c holds columns 2c and 2c + 1 of every 8-column tile j of a product. The scan wants each lane to own a
// run of consecutive keys: slot 8j + 2c + b of a product over 4 kRun keys is key c * kRun + 2j + b. Keys lie in natural
// order; the lanes' addresses interleave them, so that a product may have the oldest 4 kRun keys of a tile alone, where
// a warp's rows see no others.
//
// Chunks of 16 bytes are exchanged by XOR with swizzle(key), which is linear over XOR and takes all eight values on the
// keys {0, 1} + {0, 1, 2, 3} * kRun that one phase of ldmatrix reads, whether kRun is 4, 8 or 16.
#pragma once

#include "ptx/regalloc.cuh"
#include "tile/tile_product.cuh"

namespace mfx::stick {

__host__ __device__ constexpr std::uint32_t key_swizzle(std::uint32_t key) {
  return key % 2 + (key / 4 ^ key / 16) % 4 * 2;
}

// As device::swizzled_offset().
template <int kRowBytes>
__host__ __device__ constexpr std::uint32_t key_chunk_offset(std::uint32_t key, std::uint32_t chunk) {
  return key * kRowBytes + ((chunk ^ key_swizzle(key)) << 4);
}

// The order of keys, for device::gemm_abt() and gemm_ab().
struct InterleavedKeys {
  static constexpr int kRowsOf16 = 4;
  static constexpr int bits(int step, int sixteen) { return device::step_bits(step ^ sixteen); }
};

// This lane's index; what follows from it is computed where it is used, for most tiles do not need it.
__device__ inline std::uint32_t recomputed_lane() {
  std::uint32_t thread = threadIdx.x;
  device::hide_from_optimizer(thread);
  return thread & 31;
}

// Byte offset of chunk `chunk` of key (lane / 2 % 4) * kRun + lane % 2: of the keys {0, 1} + {0, 1, 2, 3} * kRun, those
// that go with one of eight consecutive slots.
template <int kRowBytes, int kRun>
__device__ inline std::uint32_t interleaved_offset(std::uint32_t lane, std::uint32_t chunk) {
  const std::uint32_t swizzle = kRun == 8 ? (lane & 1) + (lane & 2) * 2 + (lane >> 1 & 2) : lane & 7;
  return (lane & 6) * (kRun / 2 * kRowBytes) + (lane & 1) * kRowBytes + ((chunk ^ swizzle) << 4);
}

// Lane's offset in a tile for gemm_abt().
template <int kRowBytes, int kRun>
__device__ inline std::uint32_t interleaved_rows(std::uint32_t lane) {
  return interleaved_offset<kRowBytes, kRun>(lane, lane >> 3 & 1) + (lane & 16) * (kRowBytes / 8);
}

// Lane's offset in a tile for gemm_ab().
template <typename Op, int kRowBytes, int kRun>
__device__ inline std::uint32_t interleaved_columns(std::uint32_t lane) {
  if constexpr (device::kIs16Bit<Op>) {
    return interleaved_offset<kRowBytes, kRun>(lane, lane >> 4) + (lane & 8) * (kRowBytes / 4);
  }
  return key_chunk_offset<kRowBytes>((lane & 3) * kRun, lane >> 4) + (lane >> 2 & 3) * 4;
}

// Calls take(n), n a constant, with the smallest of kTiles / 4, kTiles / 2 and kTiles tiles of 8 keys, the oldest of a
// tile, that has all that a warp's rows see. Its last row is the `row`th of those that see the oldest key of the tile,
// and every `group` rows see one more.
template <int kTiles, typename Take>
__device__ inline void with_visible_width(int row, int group, Take&& take) {
  if constexpr (kTiles >= 8) {
    if (row < 2 * kTiles * group) return take(std::integral_constant<int, kTiles / 4>{});
  }
  if constexpr (kTiles >= 4) {
    if (row < 4 * kTiles * group) return take(std::integral_constant<int, kTiles / 2>{});
  }
  take(std::integral_constant<int, kTiles>{});
}

// How many keys those are, of a span of kSpan keys, of which the last row sees all up to `newest`: none where it is
// negative.
template <int kSpan>
__device__ inline int visible_width_keys(int newest) {
  int keys = 0;
  if (newest >= 0) with_visible_width<kSpan / 8>(newest, 1, [&](auto tiles) { keys = 8 * tiles; });
  return keys;
}

}  // namespace mfx::stick
