// Where a block's query rows and keys are.
#pragma once

#include "core/dtype_of.hpp"
#include "ptx/regalloc.cuh"
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

// The rows from `first` on of one sequence and K/V head, in a tensor of q's shape [B, Tq, H, G, D]; of their columns
// those from `column` on.
template <typename T>
struct QRows {
  T* base;
  std::int64_t token_stride, group_stride;
  int first, count, group;

  __device__ QRows(TensorPointer<T> tensor, const StickQueryStrides& strides, const StickAttentionProblem& p,
                   const Sequence& s, std::int64_t head, int first_row, int column = 0)
      : base(static_cast<T*>(tensor) + column + s.batch * strides.batch + s.q_begin * strides.token +
             head * strides.head),
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

  // Elements from any row to the one `rows` after it; 0 where that is not the same for all.
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

// Where a key is.
template <typename T>
__device__ inline T* kv_pointer(TensorPointer<T> tensor, const StickKeyStrides& strides, const Sequence& s,
                                std::int64_t head, std::int64_t first = 0) {
  return static_cast<T*>(tensor) + s.batch * strides.batch + (s.k_begin + first) * strides.token + head * strides.head;
}

// The keys from `first` on of one sequence and K/V head, like QRows.
template <typename T>
struct KvRows {
  T* base;
  std::int64_t token_stride;
  int count;

  __device__ KvRows(TensorPointer<T> tensor, const StickKeyStrides& strides, const Sequence& s, std::int64_t head,
                    int first, int column = 0)
      : base(kv_pointer<T>(tensor, strides, s, head, first) + column),
        token_stride(strides.token),
        count(s.keys - first) {}

  __device__ T* at(int row) const { return base + row * token_stride; }
  __device__ T* operator[](int row) const { return row < count ? at(row) : nullptr; }
  __device__ std::int64_t stride(int rows) const { return rows * token_stride; }
};

}  // namespace mfx::stick
