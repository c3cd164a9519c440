// How results leave a block.
#pragma once

#include "stick_attention/stick_break.cuh"
#include "stick_attention/tile_loader.cuh"
#include "tile/all_finite.cuh"

namespace mfx::stick {

template <int kTiles>
__device__ inline void scale(float (&acc)[kTiles][4], float factor) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) acc[i / 4][i % 4] *= factor;
}

// An accumulator [16, 8 kTiles] rounded to T: per tile of columns this lane's pair of row g and that of row g + 8.
template <typename T, int kTiles>
struct RoundedTile {
  static constexpr int kWordsOfPair = sizeof(T) / 2;
  std::uint32_t words[2 * kTiles * kWordsOfPair];

  __device__ explicit RoundedTile(const float (&acc)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const OperandPair<T> pair = operand_pair<T>(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int word = 0; word < kWordsOfPair; ++word) words[i * kWordsOfPair + word] = pair.words[word];
    }
  }

  __device__ std::uint32_t rows_not_finite() const {
    float zero[4] = {};  // rows times zero: NaN where a number is not finite
#pragma unroll
    for (int i = 0; i < 2 * kTiles * kWordsOfPair; i += 4) {
      if constexpr (sizeof(T) == 2) {
        const device::FragmentA a = {words[i], words[i + 1], words[i + 2], words[i + 3]};
        device::multiply_step<T>(zero, a, 0, 0);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) zero[j] = __fmaf_rn(__uint_as_float(words[i + j]), 0.0f, zero[j]);
      }
    }
    std::uint32_t rows = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t lanes = __ballot_sync(device::kAllLanes, zero[2 * half] + zero[2 * half + 1] != 0.0f);
#pragma unroll
      for (int g = 0; g < 8; ++g) rows |= std::uint32_t{(lanes >> 4 * g & 15) != 0} << (8 * half + g);
    }
    return rows;
  }

  // What rounding took from the accumulator.
  __device__ void take_from(float (&acc)[kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float2 rounded = rounded_pair(OperandPair<T>{words[i]});
      acc[i / 2][i % 2 * 2] -= rounded.x;
      acc[i / 2][i % 2 * 2 + 1] -= rounded.y;
    }
  }
};

// The rows that are not finite in one of several, a bit each, the same in all lanes.
template <typename T, int... kTiles>
__device__ inline std::uint32_t rows_not_finite(const RoundedTile<T, kTiles>&... rounded) {
  return device::warp_all_finite<T>(rounded.words...) ? 0 : (rounded.rows_not_finite() | ...);
}

template <typename T>
constexpr int staging_row_bytes(int tiles) {
  const int bytes = 8 * tiles * static_cast<int>(sizeof(T));
  return bytes < 128 ? 128 : bytes;
}

// Writes a warp's results to rows [first, first + 16) of QRows or KvRows, through its own shared
// memory (16 rows of staging_row_bytes), so that they leave in chunks of 16 bytes. Of the columns `columns` exist.
template <typename T, int kTiles, typename Rows>
__device__ inline void store_rows(const RoundedTile<T, kTiles>& rounded, device::SharedAddress scratch,
                                  const Rows& rows, int first, int columns, bool aligned) {
  constexpr int kRowBytes = staging_row_bytes<T>(kTiles), kElements = 16 / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  // As in tile/tile_product.cuh: XOR selects a chunk of 128 bytes, the rest of the way is an immediate offset.
  constexpr int kTileBytes = 8 * static_cast<int>(sizeof(T));
  const device::SharedAddress own =
      scratch + device::swizzled_offset<kRowBytes>(g, c * kTileBytes / 4 / 16) + c * kTileBytes / 4 % 16;
  __syncwarp();
  device::static_for<kTiles>([&](auto tile) {
    constexpr int kBits = tile * kTileBytes % 128, kOffset = tile * kTileBytes - kBits;
    const device::SharedAddress at = own ^ kBits;
    device::static_for<2>([&](auto half) {
      const std::uint32_t* const pair = &rounded.words[(2 * tile + half) * rounded.kWordsOfPair];
      if constexpr (sizeof(T) == 2) {
        device::store_shared_32<kOffset + half * 8 * kRowBytes>(at, pair[0]);
      } else {
        device::store_shared_64<kOffset + half * 8 * kRowBytes>(at, {pair[0], pair[1]});
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
          store_unaligned_chunk(to + column, x);
        }
      }
    }
  }
}

}  // namespace mfx::stick
