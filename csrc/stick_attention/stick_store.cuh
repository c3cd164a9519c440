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

// Writes a warp's [16, 8 kTiles] through its own shared memory (16 rows of stick_store_bytes), so that rows leave in
// chunks of 16 bytes. `to(row)` is where a row's first column belongs, or null; of the columns `columns` exist.
template <typename T>
constexpr int stick_store_bytes(int tiles) {
  const int bytes = 8 * tiles * static_cast<int>(sizeof(T));
  return bytes < 128 ? 128 : bytes;
}

template <typename T, int kTiles, typename To>
__device__ inline void stick_store_rows(const float (&acc)[kTiles][4], device::SharedAddress scratch, To&& to,
                                        int columns, bool aligned) {
  constexpr int kRowBytes = stick_store_bytes<T>(kTiles);
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  __syncwarp();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = acc[tile][2 * half], y = acc[tile][2 * half + 1];
      if constexpr (sizeof(T) == 2) {
        device::store_shared_32(scratch + device::swizzled_offset<kRowBytes>(g + 8 * half, tile) + 4 * c,
                                device::pack_pair<T>(x, y));
      } else {
        const auto offset = device::swizzled_offset<kRowBytes>(g + 8 * half, 2 * tile + c / 2);
        device::store_shared_64(scratch + offset + c % 2 * 8, {__float_as_uint(x), __float_as_uint(y)});
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kTiles * 8 * static_cast<int>(sizeof(T)) / 16;
#pragma unroll 4
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks, column = chunk * (16 / static_cast<int>(sizeof(T)));
    T* const target = to(row);
    if (target == nullptr || column >= columns) continue;
    const uint4 x = device::load_shared_128(scratch + device::swizzled_offset<kRowBytes>(row, chunk));
    if (aligned) {
      device::store_global_128(target + column, x);
    } else {
      stick_scatter_chunk(target + column, x);
    }
  }
}

}  // namespace mfx
