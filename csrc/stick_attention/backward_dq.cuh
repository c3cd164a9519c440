// stick_attention backward, the dQ kernel (backward.cuh): each warp with 16 rows of the tile, per key tile
//
//   S = Q K_tile^T,  dP = dO V_tile^T,  (weights, dS) = scan(S, dP) in the registers,  dQ += dS K_tile
//
// Shared memory: Q and dO, and a ring of kStages of K and V; Q's place takes dQ at the end.
#pragma once

#include "stick_attention/kv_pipeline.cuh"
#include "stick_attention/mask.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

// Per row of a warp: delta = do . o + dr r with o as it was before rounding, and what bounds sums of G: |sum of older
// G| <= stick * dp_bound, with dp_bound >= |do| max|v| + |dr|. Lanes (g, c) get those of rows g and g + 8; of rows
// behind the sequence's end they mean nothing.
template <typename T, int kRowBytes>
__device__ inline void delta_and_bound(const BackwardLaunch& launch, const Sequence& s, std::int64_t head,
                                       int first_row, device::SharedAddress grad_rows, float v_norm, float (&delta)[2],
                                       float (&dp_bound)[2]) {
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  const QRows<const T> rows(static_cast<const T*>(params.o), params.o_strides, p, s, head, first_row);
  const auto bytes_of = [](const void* tensor) { return static_cast<const std::uint8_t*>(tensor); };
  const std::uint8_t* const own[2] = {bytes_of(rows.at(min(g, rows.count - 1))),
                                      bytes_of(rows.at(min(g + 8, rows.count - 1)))};
  const std::int64_t residual = bytes_of(params.residual) - bytes_of(params.o);
  // Odd rows take their chunks of 64 bytes in exchanged pairs, so that a load from shared memory meets no bank twice.
  const device::SharedAddress grads = grad_rows + device::swizzled_offset<kRowBytes>(g, c + g % 2 * 4);
  const std::uint32_t first_byte = (c + g % 2 * 4) * 16;
  device::RowProducts<T> with_o, squares;
  const auto add = [&](auto whole, std::uint32_t i) {  // chunk i of this lane
    const std::uint32_t bits = i % 2 * 64, offset = i / 2 * 128, byte = (first_byte ^ bits) + offset;
    const auto read = [&](uint4(&x)[2], std::int64_t at) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* const from = reinterpret_cast<const T*>(own[half] + at);
        x[half] = whole || launch.o_aligned ? device::load_global_128_constant(from) : load_unaligned_chunk(from);
      }
    };
    const device::SharedAddress at = (grads ^ bits) + offset;
    const uint4 grad[2] = {device::load_shared_128(at), device::load_shared_128<8 * kRowBytes>(at)};
    squares.add(grad, grad);
    uint4 out[2] = {}, lost[2] = {};
    if (whole || byte < p.head_dim * sizeof(T)) {
      read(out, byte);
      if (params.residual != nullptr) read(lost, byte + residual);
    }
    with_o.add(grad, out);
    if (params.residual != nullptr) with_o.add(grad, lost);
  };
  constexpr std::uint32_t kChunks = kRowBytes / 64;
  if (launch.o_aligned && p.head_dim * sizeof(T) == kRowBytes) {
#pragma unroll 4
    for (std::uint32_t i = 0; i < kChunks; ++i) add(std::true_type{}, i);
  } else {
#pragma unroll 1
    for (std::uint32_t i = 0; i < kChunks; ++i) add(std::false_type{}, i);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    delta[half] = with_o(half);
    float most = sqrtf(squares(half) * (1.03f * v_norm));  // 1.03 for rounding
    if (params.grad_remainder != nullptr && row < rows.count) {
      const std::int64_t flat = flat_row(p, s, head, first_row + row);
      const float grad = static_cast<const float*>(params.grad_remainder)[flat];
      delta[half] += grad * static_cast<const float*>(params.remainder)[flat];
      most += 1.01f * fabsf(grad);
    }
    // Where lengths overflow there is no bound, but 0 times it must be 0.
    dp_bound[half] = most < 3.4e38f ? most : 3.4e38f;
  }
}

// The greatest |v|^2 of key tiles up to the newest, in all lanes.
__device__ inline float v_norm_max(const float* v_norms, int count) {
  float v_norm = 0.0f;
  for (int i = threadIdx.x & 31; i < count; i += 32) v_norm = fmaxf(v_norm, v_norms[i]);
  return device::lanes_max(v_norm);
}

template <typename Op, int kDim>
__device__ inline void backward_dq(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Tiles = BackwardDqShape<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kStages = Tiles::kStages, kRows = Tiles::kRows;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const BlockInfo tile(p, kRows, blockIdx.x);
  const Sequence& s = tile.s;
  const int head = tile.head;
  const int first_row = tile.first_row;
  if (first_row >= s.rows) return;
  const ChunkWalk keys(launch, tile, kRows);
  if (!keys.any) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const device::SharedAddress queries = device::shared_address(shared), grads = queries + Tiles::kQueryBytes,
                              ring = grads + Tiles::kQueryBytes;
  const TileLoader<T, kRowBytes, Tiles::kThreads> copy(p.head_dim);
  copy.template rows<kRows>(queries, {static_cast<const T*>(p.q), p.q_strides, p, s, head, first_row},
                            launch.q_aligned);
  copy.template rows<kRows>(grads, {static_cast<const T*>(params.grad_o), params.grad_o_strides, p, s, head, first_row},
                            launch.grad_o_aligned);
  device::cp_async_commit();

  int key_tile = keys.newest_tile(kKeys);
  KvPipeline<Op, kRowBytes, kKeys, kStages, Tiles::kThreads, KvColumns::kOfK> kv(ring, copy, p, s, head, key_tile,
                                                                                 launch.k_aligned, launch.v_aligned);
  kv.prefetch(keys.begin < keys.end);

  const int lane = threadIdx.x & 31, row_in_tile = static_cast<int>(threadIdx.x / 32) * 16;
  const int warp_row = first_row + row_in_tile;
  Mask<kKeys> mask(p, s, warp_row);
  mask.prefetch(key_tile);
  const float v_norm = v_norm_max(launch.v_norms + head * launch.norm_slots + norm_slot(p, tile.slot.sequence),
                                  keys.newest_key < 0 ? 0 : keys.newest_key / kNormKeys + 1);
  device::cp_async_wait<kStages - 1>();
  __syncthreads();
  BackwardRows<2> rows;  // this lane's
  delta_and_bound<T, kRowBytes>(launch, s, head, warp_row, grads + row_in_tile * kRowBytes, v_norm, rows.delta,
                                rows.dp_bound);

  // One behind the sequence's end has no stick.
  const std::int64_t own_row = workspace_row(launch, s, head, warp_row + lane / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    rows.rem[half] = row < s.rows ? 1.0f : 0.0f;
    rows.sum_g[half] = 0.0f;
    if (row < s.rows && !keys.starts) {
      const float2 state = launch.states[own_row + 8 * half];
      rows.rem[half] = state.x;
      rows.sum_g[half] = state.y;
    }
  }
  const Beta beta{-launch.factor};
  const device::SharedAddress query_rows = device::a_rows<kRowBytes>(queries + row_in_tile * kRowBytes);
  const device::SharedAddress grad_rows = device::a_rows<kRowBytes>(grads + row_in_tile * kRowBytes);

  // In registers for the whole walk, where they have room.
  const device::RowsA<kRowBytes, kDim <= 128 && device::kIs16Bit<Op>> q(query_rows);
  const device::RowsA<kRowBytes, kDim <= 64 && device::kIs16Bit<Op>> grad_o(grad_rows);

  // dQ in accumulator layout, at the same place for every K/V chunk.
  float grad_q[kDim / 8][4] = {};
  const auto for_sums = [&](const BlockInfo& of, std::uint32_t but, auto&& each) {
    const int row = of.first_row + row_in_tile + lane / 4;
    float* const sums = launch.sums + workspace_row(launch, of.s, of.head, row) * p.head_dim;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half < of.s.rows && column < p.head_dim && (but >> (lane / 4 + 8 * half) & 1) == 0) {
          each(*reinterpret_cast<float2*>(sums + 8 * half * p.head_dim + column), grad_q[t][2 * half],
               grad_q[t][2 * half + 1]);
        }
      }
    }
  };
  if (!keys.starts) {
    for_sums(tile, 0, [](const float2& sum, float& x, float& y) {
      x = sum.x;
      y = sum.y;
    });
  }

  // This lane's chunk state of row g; that of row g + 8 is eight rows further.
  std::int64_t span_bytes = -kRunsOfSpan * static_cast<int>(sizeof(ChunkState)) * (p.heads * launch.rows);
  pin_if_16bit<T>(span_bytes);
  ChunkState* chunk_state = launch.chunk_states +
                            (key_tile - launch.chunk_begin / kKeys) * (p.heads * launch.rows * kRunsOfSpan) +
                            own_row * kRunsOfSpan + lane % 4;
  for (; key_tile * kKeys >= keys.begin; --key_tile) {
    kv.wait();
    __syncthreads();  // the tile is there for all, all are done with the one before, and its stage is free
    const device::SharedAddress stage = kv.take((key_tile - 1) * kKeys >= keys.begin);
    mask.take(key_tile);
    mask.with_visible_width(key_tile, [&](auto width) {
      float scores[width][4] = {}, grad_weights[width][4] = {};
      device::gemm_abt<Op, kRowBytes, InterleavedKeys>(scores, q, kv.k_rows(stage, width));
      device::gemm_abt<Op, kRowBytes, InterleavedKeys>(grad_weights, grad_o, kv.v_rows(stage, width));
      mask.apply(key_tile, width, [&](auto masked, const Visible<2>& visible) {
        stick_break_backward<Op, masked>(scores, grad_weights, beta, visible, rows,
                                         [&](int half, const ChunkState& run) {
                                           if (warp_row + lane / 4 + 8 * half < s.rows) {
                                             chunk_state[8 * half * kRunsOfSpan] = run;
                                           }
                                         });
      });
      device::gemm_ab<Op, kRowBytes, InterleavedKeys>(grad_q, device::to_operand<Op>(grad_weights),
                                                      kv.columns(stage, width));
    });
    chunk_state = reinterpret_cast<ChunkState*>(reinterpret_cast<std::uint8_t*>(chunk_state) + span_bytes);
  }
  device::cp_async_wait_all();

  if (device::kStepByStep<Op> && device::never(kDim)) return;  // or registers run short for float, head dim 256
  constexpr bool kKeepInfo = kRowBytes <= 256;                 // where registers allow
  const BlockInfo done = kKeepInfo ? tile : BlockInfo::recompute(p, kRows);
  const ChunkWalk walked = kKeepInfo ? keys : ChunkWalk(launch, done, kRows);
  if (walked.finishes) {
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_q[t][i] *= launch.scale;
    }
  }
  const RoundedTile<T, kDim / 8> rounded(grad_q);
  const std::uint32_t not_finite = rows_not_finite(rounded);
  if (walked.finishes) {
    const QRows<T> out(static_cast<T*>(params.grad_q), params.grad_q_strides, p, done.s, done.head, done.first_row);
    store_rows<T>(rounded, queries + row_in_tile * kRowBytes, out, row_in_tile, static_cast<int>(p.head_dim),
                  launch.grad_q_aligned);
  } else {
    for_sums(done, not_finite, [](float2& sum, float x, float y) { sum = {x, y}; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_in_tile + lane / 4 + 8 * half;
      if (lane % 4 == 0 && done.first_row + row < done.s.rows && (not_finite >> row % 16 & 1) == 0) {
        launch.states[workspace_row(launch, done.s, done.head, done.first_row + row)] = {rows.rem[half],
                                                                                         rows.sum_g[half]};
      }
    }
  }
  row_by_row(not_finite, [&](int row) {
    backward_dq_row<Op, kDim, kKeys, kRunsOfSpan>(launch, done, walked, done.first_row + row_in_tile + row, 0);
  });
}

}  // namespace mfx::stick
