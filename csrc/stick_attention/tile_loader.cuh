// How tiles of a problem's tensors come to shared memory.
#pragma once

#include "stick_attention/block_info.cuh"
#include "stick_attention/interleaved_keys.cuh"
#include "tile/chunk.cuh"
#include "tile/static_for.cuh"
#include "tile/tile_product.cuh"

namespace mfx::stick {

using device::copy_chunk;
using device::load_unaligned_chunk;
using device::pin_if_16bit;
using device::Storage;
using device::store_unaligned_chunk;

// A head's columns are whole chunks, so that one has 16 bytes or, beyond the head or where there is no row, 0.
inline constexpr device::Partial kWholeChunks = device::Partial::kNever;

// Copies rows of a problem's tensors into swizzled tiles with all kThreads threads of the block, or of a warp, each
// thread one column of chunks. Columns from head_dim on are filled with zeros, and so are rows that are not there.
template <typename T, int kRowBytes, int kThreads>
struct TileLoader {
  static constexpr int kChunks = kRowBytes / 16;  // per row
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "a thread keeps its column");

  int row, column;           // of this thread
  std::uint32_t bytes;       // of a chunk in its column: 16 or, beyond the head dimension, 0
  std::uint32_t offset;      // of its first chunk in a tile
  std::uint32_t key_offset;  // the same in a tile of keys

  __device__ explicit TileLoader(std::int64_t head_dim, std::uint32_t thread = threadIdx.x)
      : row(static_cast<int>(thread / kChunks)),
        column(static_cast<int>(thread % kChunks * (16 / sizeof(T)))),
        bytes(column < head_dim ? 16 : 0),
        offset(device::swizzled_offset<kRowBytes>(row, thread % kChunks)),
        key_offset(key_chunk_offset<kRowBytes>(row, thread % kChunks)) {
    if constexpr (kThreads > 32) {  // that of a warp is made where it is used
      device::pin_in_register(bytes);
      pin_if_16bit<T>(offset, key_offset);
    }
  }

  // One chunk, kRound rounds after the first; `size` is `bytes` or, where it is not there, 0.
  template <int kRound, int kOffset = 0>
  __device__ void chunk(device::SharedAddress tile, const T* from, std::uint32_t size, bool aligned) const {
    constexpr int kRow = kRound * kRowsAtOnce;
    // Eight rows further on the swizzle is the same.
    const device::SharedAddress to =
        kRow % 8 == 0 ? tile + offset
                      : tile + device::swizzled_offset<kRowBytes>(kRow % 8 + row, threadIdx.x % kChunks);
    constexpr int kBehind = kRow / 8 * 8 * kRowBytes;
    copy_chunk<T, kWholeChunks, kOffset + kBehind>(to, from, size, aligned);
  }

  // This thread's chunk of the first round of a tile, and bytes from round to round; 0 where rows must be found one by
  // one.
  struct Lane {
    const std::uint8_t* own;
    std::int64_t step;
  };
  template <typename Rows>
  __device__ Lane lane(const Rows& rows, bool aligned) const {
    return {reinterpret_cast<const std::uint8_t*>(rows.at(row) + column),
            aligned ? rows.stride(kRowsAtOnce) * static_cast<int>(sizeof(T)) : 0};
  }

  // Copies the tile that is `index` tiles of kRows after the first of those whose lane() is `lane`, kOffset bytes
  // after `tile`. It is whole.
  template <int kRows, int kOffset = 0>
  __device__ void whole_rows(device::SharedAddress tile, const Lane& lane, int index = 0) const {
    static_assert(kRows % kRowsAtOnce == 0, "whole rounds");
    constexpr int kRounds = kRows / kRowsAtOnce;
    const std::uint8_t* from = lane.own + index * kRounds * lane.step;
    device::static_for<kRounds>([&](auto round) {
      chunk<round, kOffset>(tile, reinterpret_cast<const T*>(from), bytes, true);
      if constexpr (round + 1 < kRounds) from += lane.step;
      device::hide_from_optimizer(from);  // one step in registers, not its multiples
    });
  }

  // The same of `all`, of which only some may be there.
  template <int kRows, typename Rows = QRows<const T>>
  __device__ void rows(device::SharedAddress tile, const Rows& all, bool aligned, const Lane& lane,
                       int index = 0) const {
    if (lane.step != 0 && (index + 1) * kRows <= all.count) return whole_rows<kRows>(tile, lane, index);
#pragma unroll 1
    for (int in_tile = row; in_tile < kRows; in_tile += kRowsAtOnce) {
      const int at = index * kRows + in_tile;
      const bool there = at < all.count;
      copy_chunk<T, kWholeChunks>(tile + device::swizzled_offset<kRowBytes>(in_tile, threadIdx.x % kChunks),
                                  all.at(there ? at : 0) + column, there ? bytes : 0, aligned);
    }
  }
  template <int kRows, typename Rows = QRows<const T>>
  __device__ void rows(device::SharedAddress tile, const Rows& all, bool aligned) const {
    rows<kRows>(tile, all, aligned, lane(all, aligned));
  }

  // This thread's chunk of the last round of a tile of kKeys that begins at `first`.
  template <int kKeys>
  __device__ const std::uint8_t* newest_key(const T* first, std::int64_t stride) const {
    return reinterpret_cast<const std::uint8_t*>(first + (kKeys - kRowsAtOnce + row) * stride + column);
  }
  // Bytes from round to round, towards older keys.
  __device__ static std::int64_t key_step(std::int64_t stride) {
    return -kRowsAtOnce * static_cast<std::int64_t>(sizeof(T)) * stride;
  }

  // Copies a tile of kKeys, kOffset bytes after `tile`, and moves `newest` to the tile before. `each` copies a chunk.
  template <int kKeys, typename Each>
  __device__ void each_key(device::SharedAddress tile, const std::uint8_t*& newest, std::int64_t step,
                           Each&& each) const {
    static_assert(kKeys % kRowsAtOnce == 0, "whole rounds");
    constexpr int kRounds = kKeys / kRowsAtOnce;
    const device::SharedAddress own = tile + key_offset;
    device::static_for<kRounds>([&](auto i) {
      constexpr std::integral_constant<int, (kRounds - 1 - i) * kRowsAtOnce> kRow;
      each(kRow, own ^ key_swizzle(kRow) << 4, reinterpret_cast<const T*>(newest));
      newest += step;
      device::hide_from_optimizer(newest);  // one step in registers, not its multiples
    });
  }
  template <int kKeys, int kOffset = 0>
  __device__ void whole_keys(device::SharedAddress tile, const std::uint8_t*& newest, std::int64_t step) const {
    each_key<kKeys>(tile, newest, step, [&](auto key, device::SharedAddress to, const T* from) {
      device::cp_async<16, kOffset + key * kRowBytes>(to, from, bytes);
    });
  }

  // The same where only `keys` are there, or addresses are not aligned.
  template <int kKeys, int kOffset = 0>
  __device__ void keys(device::SharedAddress tile, const std::uint8_t*& newest, std::int64_t step, int keys,
                       bool aligned) const {
    if (keys >= kKeys && aligned) return whole_keys<kKeys, kOffset>(tile, newest, step);
    each_key<kKeys>(tile, newest, step, [&](auto key, device::SharedAddress to, const T* from) {
      copy_chunk<T, kWholeChunks, kOffset + key * kRowBytes>(to, from, row + key < keys ? bytes : 0, aligned);
    });
  }
};

}  // namespace mfx::stick
