// Where a block's query rows and keys are, and how tiles of them come to shared memory.
#pragma once

#include "device/cp_async.cuh"
#include "device/static_for.cuh"
#include "device/tile_product.cuh"
#include "device/vector_memory.cuh"
#include "stick_attention/stick_launch.hpp"
#include "stick_attention/stick_scan.cuh"

namespace mfx {

// One sequence of the batch. Of a packed batch q_begin and k_begin are its places, else `batch` is.
struct StickSequence {
  std::int64_t batch, q_begin, k_begin;
  int keys, rows, history;  // history: keys older than the first query

  __device__ StickSequence(const StickAttentionProblem& p, std::int64_t index) {
    const bool packed = p.cu_seqlens_q != nullptr;
    batch = packed ? 0 : index;
    q_begin = packed ? p.cu_seqlens_q[index] : 0;
    k_begin = packed ? p.cu_seqlens_k[index] : 0;
    keys = packed ? p.cu_seqlens_k[index + 1] - static_cast<int>(k_begin) : static_cast<int>(p.tokens_k);
    const int queries = packed ? p.cu_seqlens_q[index + 1] - static_cast<int>(q_begin) : static_cast<int>(p.tokens_q);
    history = keys - queries;
    rows = queries * static_cast<int>(p.group);
  }

  // The newest key that a row sees; negative if none.
  __device__ int newest_key(const StickAttentionProblem& p, int row) const {
    return history + row / static_cast<int>(p.group) - (p.attend_current ? 0 : 1);
  }
};

// First tile slot of a sequence; stick_tile_slots() has the reason. `cu_seqlens` is null where all have `tokens`.
__device__ inline std::int64_t stick_first_slot(const std::int32_t* cu_seqlens, std::int64_t group, std::int64_t tokens,
                                                int tile_rows, std::int64_t sequence) {
  if (cu_seqlens != nullptr) return cu_seqlens[sequence] * group / tile_rows + sequence;
  return sequence * ((tokens * group + tile_rows - 1) / tile_rows);
}

struct StickSlot {
  std::int64_t sequence, tile;
};

// The sequence that owns a tile slot, and which of its tiles it is.
__device__ inline StickSlot stick_find_slot(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t group,
                                            std::int64_t tokens, int tile_rows, std::int64_t slot) {
  if (cu_seqlens == nullptr) {
    const auto tiles = static_cast<std::uint32_t>((tokens * group + tile_rows - 1) / tile_rows);
    const auto index = static_cast<std::uint32_t>(slot);
    return {index / tiles, index % tiles};
  }
  std::int64_t first = 0, last = sequences - 1;  // the last sequence whose first slot is not beyond
  while (first < last) {
    const std::int64_t middle = (first + last + 1) / 2;
    if (stick_first_slot(cu_seqlens, group, tokens, tile_rows, middle) <= slot) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return {first, slot - stick_first_slot(cu_seqlens, group, tokens, tile_rows, first)};
}

// The rows from `first` on of one sequence and K/V head, in a tensor of q's shape [B, Tq, H, G, D].
template <typename T>
struct StickRows {
  T* base;
  std::int64_t token_stride, group_stride;
  int first, count, group;

  __device__ StickRows(T* tensor, const StickQueryStrides& strides, const StickAttentionProblem& p,
                       const StickSequence& s, std::int64_t head, int first_row)
      : base(tensor + s.batch * strides.batch + s.q_begin * strides.token + head * strides.head),
        token_stride(strides.token),
        group_stride(strides.group),
        first(first_row),
        count(s.rows - first_row),
        group(static_cast<int>(p.group)) {}

  // Null beyond the sequence's end.
  __device__ T* operator[](int row) const {
    if (row >= count) return nullptr;
    const int token = (first + row) / group;
    return base + token * token_stride + (first + row - token * group) * group_stride;
  }
};

// Index of a row in [B, Tq, H, G].
__device__ inline std::int64_t stick_flat_row(const StickAttentionProblem& p, const StickSequence& s, std::int64_t head,
                                              int row) {
  const int group = static_cast<int>(p.group), token = row / group;
  return ((s.batch * p.tokens_q + s.q_begin + token) * p.heads + head) * group + (row - token * group);
}

// 16 bytes of a row whose address may have any alignment its element type allows.
template <typename T>
__device__ inline uint4 stick_gather_chunk(const T* from) {
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
__device__ inline void stick_scatter_chunk(T* to, const uint4& x) {
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

// One chunk of a tile: asynchronously where addresses are aligned, zeros where there is no source.
template <typename T>
__device__ inline void stick_copy_chunk(device::SharedAddress to, const T* from, bool present, bool aligned) {
  if (aligned) {
    device::cp_async<16>(to, from, present ? 16 : 0);
  } else {
    device::store_shared_128(to, present ? stick_gather_chunk(from) : uint4{0, 0, 0, 0});
  }
}

// Copies rows of a problem's tensors into swizzled tiles with all kThreads threads of the block, each thread one column
// of chunks. Columns from head_dim on are filled with zeros, and so are rows that are not there.
template <typename T, int kRowBytes, int kThreads>
struct StickTileCopy {
  static constexpr int kChunks = kRowBytes / 16;  // per row
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "a thread keeps its column");

  int row, column;  // of this thread
  bool inside;      // whether the column belongs to the head dimension

  __device__ explicit StickTileCopy(std::int64_t head_dim)
      : row(static_cast<int>(threadIdx.x) / kChunks),
        column(static_cast<int>(threadIdx.x) % kChunks * (16 / static_cast<int>(sizeof(T)))),
        inside(column < head_dim) {}

  // Where this thread's chunk of row i * kRowsAtOnce + row lies in a tile.
  __device__ device::SharedAddress place(device::SharedAddress tile, int i) const {
    return tile + device::swizzled_offset<kRowBytes>(i * kRowsAtOnce + row, threadIdx.x % kChunks);
  }

  template <int kRows>
  __device__ void rows(device::SharedAddress tile, const StickRows<const T>& from, bool aligned) const {
#pragma unroll
    for (int i = 0; i < (kRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      if (kRows < kRowsAtOnce && row >= kRows) break;
      const T* source = from[i * kRowsAtOnce + row];
      const bool present = source != nullptr && inside;
      stick_copy_chunk(place(tile, i), present ? source + column : from.base, present, aligned);
    }
  }

  // `keys` keys from `from` on (more are not there), in the order of stick_key_of_slot.
  template <int kKeys>
  __device__ void keys(device::SharedAddress tile, const T* from, std::int64_t stride, int keys, bool aligned) const {
    static_assert(kKeys % kRowsAtOnce == 0, "whole rounds");
    const int first = stick_key_of_slot<kKeys>(row);
    const T* const source = from + first * stride + (inside ? column : 0);
    if (keys >= kKeys && aligned) {
      const std::uint32_t bytes = inside ? 16 : 0;
      device::static_for<kKeys / kRowsAtOnce>([&](auto i) {
        constexpr std::int64_t key = stick_key_of_slot<kKeys>(i * kRowsAtOnce);
        device::cp_async<16>(place(tile, i), source + key * stride, bytes);
      });
    } else {
      device::static_for<kKeys / kRowsAtOnce>([&](auto i) {
        constexpr int key = stick_key_of_slot<kKeys>(i * kRowsAtOnce);
        const bool present = inside && first + key < keys;
        stick_copy_chunk(place(tile, i), present ? source + key * stride : from, present, aligned);
      });
    }
  }
};

// The keys of a tile that padding leaves, one bit per key, the same in all warps. Loading is apart from using, so that
// other work comes between.
template <int kKeys>
class StickKeep {
 public:
  __device__ StickKeep(const StickAttentionProblem& p, const StickSequence& s)
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

  // Of this lane's run in the tile that was loaded last.
  __device__ std::uint32_t run() const {
    constexpr int kRun = kKeys / 4;
    if (mask_ == nullptr) return (1u << kRun) - 1;
    std::uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ballot_sync(device::kAllLanes, kept_[i]);
    const int first = static_cast<int>(threadIdx.x & 3) * kRun;
    return (kWords == 1 || first < 32 ? words[0] : words[kWords - 1]) >> (first & 31) & ((1u << kRun) - 1);
  }

 private:
  static constexpr int kWords = (kKeys + 31) / 32;
  const bool* mask_;
  int keys_;
  bool kept_[kWords] = {};
};

}  // namespace mfx
