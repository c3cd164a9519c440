// How results leave a block.
#pragma once

#include "stick_attention/stick_geometry.cuh"

namespace mfx {

// Storage type of an operand type.
template <typename Op>
struct StickStorage {
  using Type = Op;
};
template <>
struct StickStorage<device::Tf32> {
  using Type = float;
};

template <typename T>
constexpr int stick_store_bytes(int tiles) {
  const int bytes = 8 * tiles * static_cast<int>(sizeof(T));
  return bytes < 128 ? 128 : bytes;
}

// Writes a warp's [16, 8 kTiles] to rows [first, first + 16) of StickRows or StickKeyRows, through its own shared
// memory (16 rows of stick_store_bytes), so that they leave in chunks of 16 bytes. Of the columns `columns` exist.
template <typename T, int kTiles, typename Rows>
__device__ inline void stick_store_rows(const float (&acc)[kTiles][4], device::SharedAddress scratch, const Rows& rows,
                                        int first, int columns, bool aligned) {
  constexpr int kRowBytes = stick_store_bytes<T>(kTiles), kElements = 16 / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  // As in device/tile_product.cuh: XOR selects a chunk of 128 bytes, the rest of the way is an immediate offset.
  constexpr int kTileBytes = 8 * static_cast<int>(sizeof(T));
  const device::SharedAddress own =
      scratch + device::swizzled_offset<kRowBytes>(g, c * kTileBytes / 4 / 16) + c * kTileBytes / 4 % 16;
  __syncwarp();
  device::static_for<kTiles>([&](auto tile) {
    constexpr int kBits = tile * kTileBytes % 128, kOffset = tile * kTileBytes - kBits;
    const device::SharedAddress at = own ^ kBits;
    device::static_for<2>([&](auto half) {
      const float x = acc[tile][2 * half], y = acc[tile][2 * half + 1];
      if constexpr (sizeof(T) == 2) {
        device::store_shared_32<kOffset + half * 8 * kRowBytes>(at, device::pack_pair<T>(x, y));
      } else {
        device::store_shared_64<kOffset + half * 8 * kRowBytes>(at, {__float_as_uint(x), __float_as_uint(y)});
      }
    });
  });
  __syncwarp();
  constexpr int kChunks = kTiles * kTileBytes / 16, kLanes = kChunks < 32 ? kChunks : 32;  // that share a row
  constexpr int kRowsAtOnce = 32 / kLanes, kRounds = 16 / kRowsAtOnce;
  const int row = lane / kLanes;
  const std::int64_t stride = rows.stride(kRowsAtOnce);
#pragma unroll
  for (int chunk = lane % kLanes; chunk < kChunks; chunk += kLanes) {
    const int column = chunk * kElements;
    if (column >= columns) break;
    const device::SharedAddress from = scratch + device::swizzled_offset<kRowBytes>(row, chunk);
    if (first + 16 <= rows.count && aligned && stride != 0) {
      T* to = rows.at(first + row) + column;
      device::static_for<kRounds>([&](auto round) {
        constexpr int kRow = round * kRowsAtOnce;
        device::store_global_128(to, device::load_shared_128<kRow * kRowBytes>(from ^ (kRow % 8 * 16)));
        to += stride;
      });
    } else {
#pragma unroll 1
      for (int round = 0; round < kRounds; ++round) {
        const int at = round * kRowsAtOnce;
        T* const to = rows[first + row + at];
        if (to == nullptr) break;
        const uint4 x = device::load_shared_128((from ^ (at % 8 * 16)) + at * kRowBytes);
        if (aligned) {
          device::store_global_128(to + column, x);
        } else {
          stick_scatter_chunk(to + column, x);
        }
      }
    }
  }
}

}  // namespace mfx
