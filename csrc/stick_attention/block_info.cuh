// Where a block's query rows and keys are, and how tiles of them come to shared memory.
#pragma once

#include "device/cp_async.cuh"
#include "device/regalloc.cuh"
#include "device/static_for.cuh"
#include "device/tile_product.cuh"
#include "device/vector_memory.cuh"
#include "stick_attention/interleaved_keys.cuh"
#include "stick_attention/stick_break.cuh"
#include "stick_attention/stick_launch.hpp"

namespace mfx::stick {

// One sequence of the batch. Of a packed batch q_begin and k_begin are its places, else `batch` is. Numbers of blocks,
// and so of sequences and heads, are below 2^31.
struct Sequence {
  int batch, q_begin, k_begin;
  int keys, rows, history;  // history: keys older than the first query

  __device__ Sequence(const StickAttentionProblem& p, std::int64_t index) {
    const bool packed = p.cu_seqlens_q != nullptr;
    batch = packed ? 0 : static_cast<int>(index);
    q_begin = packed ? p.cu_seqlens_q[index] : 0;
    k_begin = packed ? p.cu_seqlens_k[index] : 0;
    keys = packed ? p.cu_seqlens_k[index + 1] - k_begin : static_cast<int>(p.tokens_k);
    const int queries = packed ? p.cu_seqlens_q[index + 1] - q_begin : static_cast<int>(p.tokens_q);
    history = keys - queries;
    rows = queries * static_cast<int>(p.group);
  }

  // The first row that sees a key; not above 0 if all do, and of keys that all rows see by 64 keys no less.
  __device__ int first_row(const StickAttentionProblem& p, int key) const {
    return max(key - history + (p.attend_current ? 0 : 1), -64) * static_cast<int>(p.group);
  }

  // The newest key that a row sees; negative if none.
  __device__ int newest_key(const StickAttentionProblem& p, int row) const {
    return history + row / static_cast<int>(p.group) - (p.attend_current ? 0 : 1);
  }
};

// First tile slot of a sequence; stick_tile_slots() has the reason. `cu_seqlens` is null where all have `tokens`.
__device__ inline std::int64_t first_slot(const std::int32_t* cu_seqlens, std::int64_t group, std::int64_t tokens,
                                          int tile_rows, std::int64_t sequence) {
  if (cu_seqlens != nullptr) return cu_seqlens[sequence] * group / tile_rows + sequence;
  return sequence * ((static_cast<std::uint64_t>(tokens * group) + tile_rows - 1) / tile_rows);
}

struct Slot {
  int sequence, tile;
};

// The sequence that owns a tile slot, and which of its tiles it is.
__device__ inline Slot find_slot(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t group,
                                 std::int64_t tokens, int tile_rows, std::int64_t slot) {
  if (cu_seqlens == nullptr) {
    const auto tiles =
        static_cast<std::uint32_t>((static_cast<std::uint64_t>(tokens * group) + tile_rows - 1) / tile_rows);
    const auto index = static_cast<std::uint32_t>(slot);
    return {static_cast<int>(index / tiles), static_cast<int>(index % tiles)};
  }
  std::int64_t first = 0, last = sequences - 1;  // the last sequence whose first slot is not beyond
  while (first < last) {
    const std::int64_t middle = (first + last + 1) / 2;
    if (first_slot(cu_seqlens, group, tokens, tile_rows, middle) <= slot) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return {static_cast<int>(first), static_cast<int>(slot - first_slot(cu_seqlens, group, tokens, tile_rows, first))};
}

// The tile of query rows that a block owns. Late tiles, which walk furthest, start first; heads side by side.
struct BlockInfo {
  int head;
  Slot slot;
  Sequence s;
  int first_row;

  __device__ BlockInfo(const StickAttentionProblem& p, int rows, std::uint32_t block)
      : head(static_cast<int>(block % static_cast<std::uint32_t>(p.heads))),
        slot(find_slot(p.cu_seqlens_q, p.sequences, p.group, p.tokens_q, rows,
                       (gridDim.x - 1 - block) / static_cast<std::uint32_t>(p.heads))),
        s(p, slot.sequence),
        first_row(slot.tile * rows) {}

  // The same, computed anew after the walk: what is kept from before it takes registers all along.
  __device__ static BlockInfo recompute(const StickAttentionProblem& p, int rows) {
    std::uint32_t block = blockIdx.x;
    device::hide_from_optimizer(block);
    return {p, rows, block};
  }
};

// The rows from `first` on of one sequence and K/V head, in a tensor of q's shape [B, Tq, H, G, D].
template <typename T>
struct QRows {
  T* base;
  std::int64_t token_stride, group_stride;
  int first, count, group;

  __device__ QRows(T* tensor, const StickQueryStrides& strides, const StickAttentionProblem& p, const Sequence& s,
                   std::int64_t head, int first_row)
      : base(tensor + s.batch * strides.batch + s.q_begin * strides.token + head * strides.head),
        token_stride(strides.token),
        group_stride(strides.group),
        first(first_row),
        count(s.rows - first_row),
        group(static_cast<int>(p.group)) {}

  __device__ T* at(int row) const {
    const int token = (first + row) / group;
    return base + token * token_stride + (first + row - token * group) * group_stride;
  }

  // Null beyond the sequence's end.
  __device__ T* operator[](int row) const { return row < count ? at(row) : nullptr; }

  // Elements from any row to the one `rows` behind it; 0 where that is not the same for all.
  __device__ std::int64_t stride(int rows) const {
    const int tokens = rows / group;
    return tokens * group == rows ? tokens * token_stride : 0;
  }
};

// Index of a row in [B, Tq, H, G].
__device__ inline std::int64_t flat_row(const StickAttentionProblem& p, const Sequence& s, std::int64_t head, int row) {
  const int group = static_cast<int>(p.group), token = row / group;
  return ((s.batch * p.tokens_q + s.q_begin + token) * p.heads + head) * group + (row - token * group);
}

// 16 bytes of a row whose address may have any alignment its element type allows.
template <typename T>
__device__ inline uint4 load_unaligned_chunk(const T* from) {
  if constexpr (sizeof(T) == 4) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(from);
    return {words[0], words[1], words[2], words[3]};
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
    const auto pair = [&](int i) { return halves[2 * i] | std::uint32_t{halves[2 * i + 1]} << 16; };
    return {pair(0), pair(1), pair(2), pair(3)};
  }
}

template <typename T>
__device__ inline void store_unaligned_chunk(T* to, const uint4& x) {
  const std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<std::uint32_t*>(to)[i] = words[i];
    } else {
      reinterpret_cast<std::uint16_t*>(to)[2 * i] = static_cast<std::uint16_t>(words[i]);
      reinterpret_cast<std::uint16_t*>(to)[2 * i + 1] = static_cast<std::uint16_t>(words[i] >> 16);
    }
  }
}

// One chunk of a tile, kOffset bytes behind `to`: asynchronously where addresses are aligned. It has 16 bytes or, where
// there is none, 0, and becomes zeros.
template <int kOffset = 0, typename T>
__device__ inline void copy_chunk(device::SharedAddress to, const T* from, std::uint32_t bytes, bool aligned) {
  if (aligned) {
    device::cp_async<16, kOffset>(to, from, bytes);
  } else {
    device::store_shared_128(to + kOffset, bytes != 0 ? load_unaligned_chunk(from) : uint4{0, 0, 0, 0});
  }
}

// pin_in_register() of what loops reuse, for 16-bit elements: of 32-bit ones fragments need the registers.
template <typename T, typename... Values>
__device__ inline void pin_if_16bit(Values&... values) {
  if constexpr (sizeof(T) == 2) (device::pin_in_register(values), ...);
}

// Copies rows of a problem's tensors into swizzled tiles with all kThreads threads of the block, each thread one column
// of chunks. Columns from head_dim on are filled with zeros, and so are rows that are not there.
template <typename T, int kRowBytes, int kThreads>
struct TileLoader {
  static constexpr int kChunks = kRowBytes / 16;  // per row
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "a thread keeps its column");

  int row, column;           // of this thread
  std::uint32_t bytes;       // of a chunk in its column: 16 or, beyond the head dimension, 0
  std::uint32_t offset;      // of its first chunk in a tile
  std::uint32_t key_offset;  // the same in a tile of keys

  __device__ explicit TileLoader(std::int64_t head_dim)
      : row(static_cast<int>(threadIdx.x / kChunks)),
        column(static_cast<int>(threadIdx.x % kChunks * (16 / sizeof(T)))),
        bytes(column < head_dim ? 16 : 0),
        offset(device::swizzled_offset<kRowBytes>(row, threadIdx.x % kChunks)),
        key_offset(key_chunk_offset<kRowBytes>(row, threadIdx.x % kChunks)) {
    device::pin_in_register(bytes);
    pin_if_16bit<T>(offset, key_offset);
  }

  // One chunk, kRound rounds behind the first; `size` is `bytes` or, where it is not there, 0.
  template <int kRound, int kOffset = 0>
  __device__ void chunk(device::SharedAddress tile, const T* from, std::uint32_t size, bool aligned) const {
    constexpr int kRow = kRound * kRowsAtOnce;
    // Eight rows further on the swizzle is the same.
    const device::SharedAddress to =
        kRow % 8 == 0 ? tile + offset
                      : tile + device::swizzled_offset<kRowBytes>(kRow % 8 + row, threadIdx.x % kChunks);
    constexpr int kBehind = kRow / 8 * 8 * kRowBytes;
    copy_chunk<kOffset + kBehind>(to, from, size, aligned);
  }

  // This thread's chunk of the first round of a tile, and bytes from round to round; 0 where rows must be found one by
  // one.
  struct Lane {
    const std::uint8_t* own;
    std::int64_t step;
  };
  __device__ Lane lane(const QRows<const T>& rows, bool aligned) const {
    return {reinterpret_cast<const std::uint8_t*>(rows.at(row) + column),
            aligned ? rows.stride(kRowsAtOnce) * static_cast<int>(sizeof(T)) : 0};
  }

  // Copies the tile that is `index` tiles of kRows behind the first of those whose lane() is `lane`, kOffset bytes
  // behind `tile`. It is whole.
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
  template <int kRows>
  __device__ void rows(device::SharedAddress tile, const QRows<const T>& all, bool aligned, const Lane& lane,
                       int index = 0) const {
    if (lane.step != 0 && (index + 1) * kRows <= all.count) return whole_rows<kRows>(tile, lane, index);
    device::static_for<kRows / kRowsAtOnce>([&](auto round) {
      const int at = index * kRows + round * kRowsAtOnce + row;
      const bool there = at < all.count;
      chunk<round>(tile, all.at(there ? at : 0) + column, there ? bytes : 0, aligned);
    });
  }
  template <int kRows>
  __device__ void rows(device::SharedAddress tile, const QRows<const T>& all, bool aligned) const {
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

  // Copies a tile of kKeys, kOffset bytes behind `tile`, and moves `newest` to the tile before. `each` copies a chunk.
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
      copy_chunk<kOffset + key * kRowBytes>(to, from, row + key < keys ? bytes : 0, aligned);
    });
  }
};

// Keys of one sequence and K/V head, or a part of their columns, like QRows.
template <typename T>
struct KvRows {
  T* base;
  std::int64_t token_stride;
  int count;

  __device__ T* at(int row) const { return base + row * token_stride; }
  __device__ T* operator[](int row) const { return row < count ? at(row) : nullptr; }
  __device__ std::int64_t stride(int rows) const { return rows * token_stride; }
};

template <typename T>
__device__ inline T* kv_pointer(T* tensor, const StickKeyStrides& strides, const Sequence& s, std::int64_t head,
                                std::int64_t first = 0) {
  return tensor + s.batch * strides.batch + (s.k_begin + first) * strides.token + head * strides.head;
}

// The walk of a block over tiles of K and V (V behind K; once, where K is V), from the newest to the oldest.
template <typename T, int kRowBytes, int kKeys, int kThreads>
class KvPipeline {
 public:
  static constexpr int kTileBytes = kKeys * kRowBytes;
  const bool k_is_v;

  __device__ KvPipeline(const TileLoader<T, kRowBytes, kThreads>& copy, const StickAttentionProblem& p,
                        const Sequence& s, std::int64_t head, int tile, bool k_aligned, bool v_aligned)
      : k_is_v(p.k_is_v),
        copy_(copy),
        k_step_(copy.key_step(p.k_strides.token)),
        v_step_(copy.key_step(p.v_strides.token)),
        keys_(s.keys - tile * kKeys),
        k_aligned_(k_aligned),
        v_aligned_(v_aligned),
        easy_(k_aligned && v_aligned && keys_ >= kKeys) {
    const std::int64_t first = std::int64_t{tile} * kKeys;
    k_ = copy.template newest_key<kKeys>(kv_pointer(static_cast<const T*>(p.k), p.k_strides, s, head, first),
                                         p.k_strides.token);
    v_ = copy.template newest_key<kKeys>(kv_pointer(static_cast<const T*>(p.v), p.v_strides, s, head, first),
                                         p.v_strides.token);
    device::pin_in_register(k_);
    device::pin_in_register(v_);
    pin_if_16bit<T>(k_step_, v_step_);
  }

  // Copies the next tile, if it is wanted; a group of copies in any case.
  __device__ void next(device::SharedAddress to, bool wanted) {
    if (wanted) {
      if (easy_) {
        copy_.template whole_keys<kKeys>(to, k_, k_step_);
        if (!k_is_v) copy_.template whole_keys<kKeys, kTileBytes>(to, v_, v_step_);
      } else {
        copy_.template keys<kKeys>(to, k_, k_step_, keys_, k_aligned_);
        if (!k_is_v) copy_.template keys<kKeys, kTileBytes>(to, v_, v_step_, keys_, v_aligned_);
        keys_ = kKeys;  // older tiles are whole
        easy_ = k_aligned_ && v_aligned_;
      }
    }
    device::cp_async_commit();
  }

 private:
  const TileLoader<T, kRowBytes, kThreads>& copy_;
  const std::uint8_t *k_, *v_;    // this thread's newest chunk of the next tile
  std::int64_t k_step_, v_step_;  // bytes from chunk to chunk
  int keys_;                      // from the next tile on
  const bool k_aligned_, v_aligned_;
  bool easy_;
};

// The keys of a tile that padding leaves, one bit per key, the same in all warps. Loading is apart from using, so that
// other work comes between.
template <int kKeys>
class KeyPadding {
 public:
  using Bits = std::conditional_t<kKeys <= 32, std::uint32_t, std::uint64_t>;

  __device__ KeyPadding(const StickAttentionProblem& p, const Sequence& s)
      : mask_(p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + s.batch * p.tokens_k), keys_(s.keys) {}

  __device__ bool all() const { return mask_ == nullptr; }

  __device__ void load(int first_key) {
    if (mask_ == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int key = first_key + 32 * i + static_cast<int>(threadIdx.x & 31);
      kept_[i] = 32 * i + static_cast<int>(threadIdx.x & 31) < kKeys && key >= 0 && key < keys_ && mask_[key];
    }
  }

  // Of the tile that was loaded last.
  __device__ Bits bits() const {
    if (mask_ == nullptr) return ~Bits{0};
    Bits bits = 0;
#pragma unroll
    for (int i = kWords - 1; i >= 0; --i) bits = bits << 31 << 1 | __ballot_sync(device::kAllLanes, kept_[i]);
    return bits;
  }

  // The same, and loads the tile that is met next.
  __device__ Bits bits(int next_first_key) {
    const Bits kept = bits();
    load(next_first_key);
    return kept;
  }

 private:
  static constexpr int kWords = (kKeys + 31) / 32;
  const bool* mask_;
  int keys_;
  bool kept_[kWords] = {};
};

}  // namespace mfx::stick
