// What the backward kernels of stick_attention share. Two kernels, each the owner of what it writes: no atomics, no
// locks.
//
//   dQ kernel     a block per query tile walks its key tiles from the newest to the oldest, exactly those that forward
//                 visited, and owns dQ. It leaves run states: per row and run of keys, the stick at the run's newer
//                 edge and the sum of G over all keys older than the run.
//   dK/dV kernel  a block per key tile walks the query tiles that visited it and owns dK and dV. With what the dQ
//                 kernel left it scans each run on its own.
//
// Both run once per chunk of kKvChunk keys, newest K/V chunk first, so that the workspace is linear in the number of
// tokens; rows whose walk goes on in an older K/V chunk hand over stick, sum and dQ in binary32.
#pragma once

#include "stick_attention/epilogue.cuh"
#include "tile/row_products.cuh"

namespace mfx::stick {

inline constexpr int kKvChunk = 1024;  // keys
inline constexpr int kNormKeys = 64;   // keys per bound of |v|

struct BackwardLaunch {
  StickAttentionBackwardParams params;
  float factor, scale;  // scale * log2(e), scale
  int forward_keys;     // unit of first_tiles
  int chunk_begin, chunk_end;
  bool newest_chunk;
  std::int64_t rows;        // of all sequences, per head
  std::int64_t norm_slots;  // of all sequences, per head
  RunState* run_states;     // [kKvChunk / span, heads, rows, runs of a span]
  float2* states;           // [heads, rows], where there are several K/V chunks: stick, sum of G
  float* sums;              // [heads, rows, D]: dQ / scale
  float* v_norms;           // [heads, norm_slots]: greatest |v|^2
  bool q_aligned, k_aligned, v_aligned, grad_o_aligned, o_aligned, grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

// Keys that a warp scans at once, in both kernels: a span. Each lane of a quad has a run of them.
constexpr int span_keys(int row_bytes) {
  return row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
}
inline constexpr int kRunsOfSpan = 4;

template <typename Op, int kDim>
struct BackwardDqShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  static constexpr int kRows = kRowBytes <= 512 ? 64 : 32;
  static constexpr int kKeys = span_keys(kRowBytes);
  static constexpr int kStages = kRowBytes <= 256 ? 2 : 1;
  static constexpr int kThreads = 2 * kRows;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = 2 * kQueryBytes + kStages * 2 * kTileBytes;
};

template <typename Op, int kDim>
struct BackwardDkvShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  static constexpr int kKeys = sizeof(Op) == 2 ? (kDim <= 128 ? 64 : 32) : (kDim <= 128 ? 32 : 16);
  static constexpr int kSpan = span_keys(kRowBytes);
  static constexpr int kRows = kRowBytes <= 256 ? 64 : 32;
  static constexpr int kThreads = 32 * (kRows / 16) * (kKeys / kSpan);
  static constexpr int kParts = kThreads / 32 / (kKeys / 16);  // of the head dimension, per 16 keys
  static constexpr int kStages = kRowBytes <= 128 ? 2 : 1;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kExchangeRowBytes =
      kKeys * static_cast<int>(sizeof(Op)) < 128 ? 128 : kKeys * static_cast<int>(sizeof(Op));
  static constexpr int kExchangeBytes = kRows * kExchangeRowBytes;
  static constexpr int kTilesBytes = 2 * kKeyBytes + kStages * 2 * kQueryBytes + 2 * kExchangeBytes;
  static constexpr int kSharedBytes = kTilesBytes + 128;  // and a word per warp
};

// A row of a head in the workspace.
__device__ inline std::int64_t workspace_row(const BackwardLaunch& launch, const Sequence& s, std::int64_t head,
                                             int row) {
  const StickAttentionProblem& p = launch.params.problem;
  return head * launch.rows + (s.batch * p.tokens_q + s.q_begin) * p.group + row;
}

// First slot of a sequence's bounds of |v|.
__device__ inline std::int64_t norm_slot(const StickAttentionProblem& p, std::int64_t sequence) {
  return first_slot(p.cu_seqlens_k, 1, p.tokens_k, kNormKeys, sequence);
}

// The oldest key that forward visited for the tile that begins at `first_row`.
__device__ inline int first_visited_key(const BackwardLaunch& launch, const Sequence& s, std::int64_t head,
                                        int first_row) {
  return launch.params.first_tiles[flat_row(launch.params.problem, s, head, first_row)] * launch.forward_keys;
}

// The keys that a row tile walks in the K/V chunk of a launch: [begin, end).
struct ChunkWalk {
  int newest_key;  // of the whole walk
  int begin, end;
  bool any;               // whether the tile has anything to do, if only to leave zeros
  bool starts, finishes;  // the walk, in this K/V chunk

  __device__ ChunkWalk(const BackwardLaunch& launch, const BlockInfo& tile, int rows) {
    const Sequence& s = tile.s;
    newest_key = s.newest_key(launch.params.problem, min(tile.first_row + rows, s.rows) - 1);
    const int oldest_key = first_visited_key(launch, s, tile.head, tile.first_row);
    const bool nothing = oldest_key > newest_key;
    begin = max(oldest_key, launch.chunk_begin);
    end = nothing ? begin : min(newest_key + 1, launch.chunk_end);
    any = nothing ? launch.newest_chunk : begin < end;
    starts = nothing || newest_key < launch.chunk_end;
    finishes = nothing || oldest_key >= launch.chunk_begin;
  }

  // The newest tile of the walk; the one before `begin` where there is none.
  __device__ int newest_tile(int tile_keys) const {
    return begin < end ? (end - 1) / tile_keys : begin / tile_keys - 1;
  }
};

// The tile of keys that a block owns; old ones, which most rows see, start first.
struct KvBlockInfo {
  int head;
  Sequence s;
  int first_key;
  bool any;  // whether there are such keys in the K/V chunk

  __device__ KvBlockInfo(const BackwardLaunch& launch, int keys, std::uint32_t block)
      : KvBlockInfo(launch, keys, block % static_cast<std::uint32_t>(launch.params.problem.heads),
                    block / static_cast<std::uint32_t>(launch.params.problem.heads)) {}

  // As BlockInfo::recompute().
  __device__ static KvBlockInfo recompute(const BackwardLaunch& launch, int keys) {
    std::uint32_t block = blockIdx.x;
    device::hide_from_optimizer(block);
    return {launch, keys, block};
  }

 private:
  __device__ KvBlockInfo(const BackwardLaunch& launch, int keys, std::uint32_t head, std::uint32_t rest)
      : head(static_cast<int>(head)),
        s(launch.params.problem, rest % static_cast<std::uint32_t>(launch.params.problem.sequences)),
        first_key(launch.chunk_begin +
                  static_cast<int>(rest / static_cast<std::uint32_t>(launch.params.problem.sequences)) * keys),
        any(first_key < s.keys && first_key < launch.chunk_end) {}
};

// v_norms[slot] = greatest |v|^2 of 64 keys, of those that are kept: a warp each.
template <typename T>
__device__ inline void value_norms(const BackwardLaunch& launch) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const StickAttentionProblem& p = launch.params.problem;
  const std::int64_t at = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= p.heads * launch.norm_slots) return;
  const std::int64_t head = at / launch.norm_slots, slot = at % launch.norm_slots;
  const auto [sequence, tile] = find_slot(p.cu_seqlens_k, p.sequences, 1, p.tokens_k, kNormKeys, slot);
  const Sequence s(p, sequence);
  const int lane = threadIdx.x & 31, row = lane / 4, own_column = lane % 4 * kElements;
  const int keys = s.keys - tile * kNormKeys, columns = static_cast<int>(p.head_dim);
  const T* from = kv_pointer<const T>(p.v, p.v_strides, s, head, tile * kNormKeys + row) + own_column;
  const bool* const mask =
      p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + s.batch * p.tokens_k + tile * kNormKeys;
  const auto there = [&](int key) { return key < keys && (mask == nullptr || mask[key]); };
  device::RowProducts<T> squares[kNormKeys / 16];
  const auto measure = [&](auto whole) {  // whether every chunk is there, kept and aligned
#pragma unroll 1
    for (int column = 0; column < columns; column += 4 * kElements) {
      const T* chunk = from + column;
#pragma unroll
      for (int i = 0; i < kNormKeys / 16; ++i) {
        uint4 x[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (whole) {
            x[half] = device::load_global_128_constant(chunk);
          } else if (column + own_column < columns && there(16 * i + 8 * half + row)) {
            x[half] = launch.v_aligned ? device::load_global_128_constant(chunk) : load_unaligned_chunk(chunk);
          }
          chunk += 8 * p.v_strides.token;
        }
        squares[i].add(x, x);
      }
    }
  };
  if (launch.v_aligned && keys >= kNormKeys && mask == nullptr && columns % (4 * kElements) == 0) {
    measure(std::true_type{});
  } else {
    measure(std::false_type{});
  }
  float v_norm = 0.0f;
#pragma unroll
  for (const auto& of_rows : squares) v_norm = fmaxf(v_norm, fmaxf(of_rows(0), of_rows(1)));
  v_norm = device::lanes_max(v_norm);  // without NaN: who sees that needs no bound
  if (lane == 0) launch.v_norms[at] = v_norm;
}

}  // namespace mfx::stick
