// What the backward kernels of stick_attention share. Two kernels, each the owner of what it writes: no atomics, no
// locks.
//
//   query kernel   a block per query tile walks its key tiles from the newest to the oldest, exactly those that forward
//                  visited, and owns dQ. It leaves, per row and span of keys, the stick at the span's newer edge and
//                  the sum of G over all keys older than the span.
//   key kernel     a block per key tile walks the query tiles that visited it and owns dK and dV. With what the query
//                  kernel left it scans each span on its own.
//
// Both run once per window of kStickWindow keys, newest window first, so that the workspace is linear in the number of
// tokens; rows whose walk goes on in an older window hand over stick, sum and dQ in binary32.
#pragma once

#include "stick_attention/stick_store.cuh"

namespace mfx {

inline constexpr int kStickWindow = 2048;    // keys
inline constexpr int kStickLengthKeys = 64;  // keys per bound of |v|

struct StickBackwardLaunch {
  StickAttentionBackwardParams params;
  float factor, scale;  // scale * log2(e), scale
  int forward_keys;     // unit of first_tiles
  int window_begin, window_end;
  bool newest_window;
  std::int64_t rows;          // of all sequences, per head
  std::int64_t length_slots;  // of all sequences, per head
  float* sticks;              // [window / span, heads, rows]
  float* olders;              // the same
  float2* states;             // [heads, rows], where there are several windows: stick, sum of G
  float* sums;                // [heads, rows, D]: dQ / scale
  float* lengths;             // [heads, length_slots]: greatest |v|^2
  bool q_aligned, k_aligned, v_aligned, grad_o_aligned, o_aligned, grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

template <typename Op, int kDim>
struct StickQueryGradTiles {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  static constexpr int kRows = kRowBytes <= 512 ? 64 : 32;
  static constexpr int kKeys = kRowBytes <= 128 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kStages = kRowBytes <= 256 ? 2 : 1;
  static constexpr int kThreads = 2 * kRows;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kTilesBytes = 2 * kQueryBytes + kStages * 2 * kTileBytes;
  static constexpr int kSharedBytes = kTilesBytes + 128;  // and a word per warp
};

template <typename Op, int kDim>
struct StickKeyGradTiles {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  static constexpr int kKeys = sizeof(Op) == 2 ? (kDim <= 128 ? 64 : 32) : (kDim <= 128 ? 32 : 16);
  static constexpr int kSpan = kRowBytes <= 128 ? 64 : kRowBytes <= 256 ? 32 : 16;  // keys that a warp scans
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
__device__ inline std::int64_t stick_workspace_row(const StickBackwardLaunch& launch, const StickSequence& s,
                                                   std::int64_t head, int row) {
  const StickAttentionProblem& p = launch.params.problem;
  return head * launch.rows + (s.batch * p.tokens_q + s.q_begin) * p.group + row;
}

// First slot of a sequence's bounds of |v|.
__device__ inline std::int64_t stick_length_slot(const StickAttentionProblem& p, std::int64_t sequence) {
  return stick_first_slot(p.cu_seqlens_k, 1, p.tokens_k, kStickLengthKeys, sequence);
}

// The oldest key that forward visited for the tile that begins at `first_row`.
__device__ inline int stick_first_key(const StickBackwardLaunch& launch, const StickSequence& s, std::int64_t head,
                                      int first_row) {
  return launch.params.first_tiles[stick_flat_row(launch.params.problem, s, head, first_row)] * launch.forward_keys;
}

// lengths[slot] = greatest |v|^2 of 64 keys: a warp each, eight lanes per key.
template <typename T>
__device__ inline void stick_value_lengths(const StickBackwardLaunch& launch) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const StickAttentionProblem& p = launch.params.problem;
  const std::int64_t at = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= p.heads * launch.length_slots) return;
  const std::int64_t head = at / launch.length_slots, slot = at % launch.length_slots;
  const auto [sequence, tile] = stick_find_slot(p.cu_seqlens_k, p.sequences, 1, p.tokens_k, kStickLengthKeys, slot);
  const StickSequence s(p, sequence);
  const T* const v = stick_keys(static_cast<const T*>(p.v), p.v_strides, s, head);
  const int lane = threadIdx.x & 31;
  float longest = 0.0f;
  for (int i = lane / 8; i < kStickLengthKeys; i += 4) {
    const std::int64_t key = tile * kStickLengthKeys + i;
    float squares = 0.0f;
    for (int column = lane % 8 * kElements; key < s.keys && column < p.head_dim; column += 8 * kElements) {
      const T* const from = v + key * p.v_strides.token + column;
      float x[kElements];
      device::unpack_chunk<T>(launch.v_aligned ? device::load_global_128_constant(from) : stick_gather_chunk(from), x);
#pragma unroll
      for (int j = 0; j < kElements; ++j) squares += x[j] * x[j];
    }
    longest = device::max_nan(longest, device::lanes_sum<8>(squares));
  }
  longest = device::lanes_max(longest);
  if (lane == 0) launch.lengths[at] = longest;
}

}  // namespace mfx
