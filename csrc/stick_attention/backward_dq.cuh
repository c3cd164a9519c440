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

// do . o, with o as it was before rounding, and |do|^2: of a warp's 16 rows from `first_row` on, over the columns from
// `column` on of which `grad_rows` is a tile. Lanes (g, c) get those of rows g and g + 8; of rows beyond the sequence's
// end they mean nothing.
template <typename T, int kRowBytes>
__device__ inline void grad_products(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int first_row,
                                     int column, device::SharedAddress grad_rows, float (&with_o)[2],
                                     float (&squares)[2]) {
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  const QRows<const T> rows(params.o, params.o_strides, p, s, head, first_row, column);
  const std::int64_t columns = p.head_dim - column;
  const auto bytes_of = [](const void* tensor) { return static_cast<const std::uint8_t*>(tensor); };
  const std::uint8_t* const own[2] = {bytes_of(rows.at(min(g, rows.count - 1))),
                                      bytes_of(rows.at(min(g + 8, rows.count - 1)))};
  const std::int64_t residual = bytes_of(params.residual) - bytes_of(params.o);
  // Odd rows take their chunks of 64 bytes in exchanged pairs, so that a load from shared memory meets no bank twice.
  const device::SharedAddress grads = grad_rows + device::swizzled_offset<kRowBytes>(g, c + g % 2 * 4);
  const std::uint32_t first_byte = (c + g % 2 * 4) * 16;
  device::RowProducts<T> of_o, of_grad;
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
    of_grad.add(grad, grad);
    uint4 out[2] = {}, lost[2] = {};
    if (whole || byte < columns * static_cast<std::int64_t>(sizeof(T))) {
      read(out, byte);
      if (params.residual != nullptr) read(lost, byte + residual);
    }
    of_o.add(grad, out);
    if (params.residual != nullptr) of_o.add(grad, lost);
  };
  constexpr std::uint32_t kChunks = kRowBytes / 64;
  if (launch.o_aligned && columns * static_cast<std::int64_t>(sizeof(T)) >= kRowBytes) {
#pragma unroll 4
    for (std::uint32_t i = 0; i < kChunks; ++i) add(std::true_type{}, i);
  } else {
#pragma unroll 1
    for (std::uint32_t i = 0; i < kChunks; ++i) add(std::false_type{}, i);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    with_o[half] = of_o(half);
    squares[half] = of_grad(half);
  }
}

// Of a row, from grad_products(): delta = do . o + dr r, and what bounds sums of G: |sum of older G| <= stick *
// dp_bound, with dp_bound >= |do| max|v| + |dr|.
struct DeltaAndBound {
  float delta, dp_bound;

  __device__ DeltaAndBound(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int row, float with_o,
                           float squares, float v_norm)
      : delta(with_o) {
    const StickAttentionBackwardParams& params = launch.params;
    float most = sqrtf(squares * (1.03f * v_norm));  // 1.03 for rounding
    if (params.grad_remainder != nullptr && row < s.rows) {
      const std::int64_t flat = flat_row(params.problem, s, head, row);
      const float grad = static_cast<const float*>(params.grad_remainder)[flat];
      delta += grad * static_cast<const float*>(params.remainder)[flat];
      most += 1.01f * fabsf(grad);
    }
    // Where lengths overflow there is no bound, but 0 times it must be 0.
    dp_bound = most < 3.4e38f ? most : 3.4e38f;
  }
};

// The greatest |v|^2 of the keys that a row tile walks, in all lanes.
__device__ inline float v_norm_max(const BackwardLaunch& launch, const BlockInfo& tile, const ChunkWalk& keys) {
  const float* const v_norms =
      launch.v_norms + tile.head * launch.norm_slots + norm_slot(launch.params.problem, tile.slot.sequence);
  const int count = keys.newest_key < 0 ? 0 : keys.newest_key / kNormKeys + 1;
  float v_norm = 0.0f;
  for (int i = threadIdx.x & 31; i < count; i += 32) v_norm = fmaxf(v_norm, v_norms[i]);
  return device::lanes_max(v_norm);
}

// The rows of a lane, g and g + 8 from `warp_row` on, where the walk of a K/V chunk begins; of grad_products(). One
// beyond the sequence's end has no stick.
__device__ inline BackwardRows<2> begin_backward_rows(const BackwardLaunch& launch, const BlockInfo& tile,
                                                      const ChunkWalk& keys, int warp_row, const float (&with_o)[2],
                                                      const float (&squares)[2], float v_norm) {
  const Sequence& s = tile.s;
  const int lane = threadIdx.x & 31;
  BackwardRows<2> rows;
  const std::int64_t own_row = workspace_row(launch, s, tile.head, warp_row + lane / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    rows.rem[half] = row < s.rows ? 1.0f : 0.0f;
    rows.sum_g[half] = 0.0f;
    const DeltaAndBound of_row(launch, s, tile.head, row, with_o[half], squares[half], v_norm);
    rows.delta[half] = of_row.delta;
    rows.dp_bound[half] = of_row.dp_bound;
    if (row < s.rows && !keys.starts) {
      const float2 state = launch.states[own_row + 8 * half];
      rows.rem[half] = state.x;
      rows.sum_g[half] = state.y;
    }
  }
  return rows;
}

// The states of this lane's runs on their way to memory, tile by tile: those of rows g and g + 8 from `row` on.
template <typename T, int kKeys>
class RunStatesOut {
 public:
  __device__ RunStatesOut(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int row, int key_tile)
      : rows_(s.rows - row - static_cast<int>(threadIdx.x & 31) / 4),
        tile_(launch.params.problem.heads * launch.rows * kRunsOfSpan),
        state_(launch.run_states + (key_tile - launch.chunk_begin / kKeys) * tile_ +
               workspace_row(launch, s, head, row + static_cast<int>(threadIdx.x & 31) / 4) * kRunsOfSpan +
               threadIdx.x % 4) {
    pin_if_16bit<T>(tile_);
  }

  __device__ void operator()(int half, const RunState& run) const {
    if (8 * half < rows_) state_[8 * half * kRunsOfSpan] = run;
  }
  __device__ void next() { state_ -= tile_; }

 private:
  const int rows_;
  std::int64_t tile_;  // from tile to tile
  RunState* state_;
};

// A warp's dQ in accumulator layout, columns from `column` on of 16 rows from `row_in_tile` on, and its sums at the
// same place for every K/V chunk: each(sum, x, y) for those that are there, but not for the rows of `but`.
template <int kTiles, typename Each>
__device__ inline void for_sums(const BackwardLaunch& launch, const BlockInfo& tile, int row_in_tile, int column,
                                float (&grad_q)[kTiles][4], std::uint32_t but, Each&& each) {
  const std::int64_t head_dim = launch.params.problem.head_dim;
  const int lane = threadIdx.x & 31, row = tile.first_row + row_in_tile + lane / 4;
  float* const sums = launch.sums + workspace_row(launch, tile.s, tile.head, row) * head_dim + column;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int at = 8 * t + 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half < tile.s.rows && at < head_dim - column && (but >> (lane / 4 + 8 * half) & 1) == 0) {
        each(*reinterpret_cast<float2*>(sums + 8 * half * head_dim + at), grad_q[t][2 * half], grad_q[t][2 * half + 1]);
      }
    }
  }
}

// Adds what newer K/V chunks left of it.
template <int kTiles>
__device__ inline void add_sums(const BackwardLaunch& launch, const BlockInfo& tile, int row_in_tile, int column,
                                float (&grad_q)[kTiles][4]) {
  for_sums(launch, tile, row_in_tile, column, grad_q, 0, [](const float2& sum, float& x, float& y) {
    x += sum.x;
    y += sum.y;
  });
}

// Its end: dq, or sums for the older K/V chunk. Rows of `not_finite`, of which there may be more than of this warp's
// columns, are computed again later. `scratch` is shared memory that nobody else reads.
template <typename T, int kTiles>
__device__ inline void store_grad_q(const BackwardLaunch& launch, const BlockInfo& tile, const ChunkWalk& walked,
                                    int row_in_tile, int column, float (&grad_q)[kTiles][4],
                                    const RoundedTile<T, kTiles>& rounded, std::uint32_t not_finite,
                                    device::SharedAddress scratch) {
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  if (walked.finishes) {
    const QRows<T> rows(params.grad_q, params.grad_q_strides, p, tile.s, tile.head, tile.first_row, column);
    store_rows<T>(rounded, scratch, rows, row_in_tile, static_cast<int>(p.head_dim) - column, launch.grad_q_aligned);
  } else {
    for_sums(launch, tile, row_in_tile, column, grad_q, not_finite,
             [](float2& sum, float x, float y) { sum = {x, y}; });
  }
}

// A row's stick and sum of G for the older K/V chunk.
__device__ inline void store_state(const BackwardLaunch& launch, const BlockInfo& tile, const ChunkWalk& walked,
                                   int row_in_tile, std::uint32_t not_finite, float rem, float sum_g) {
  const int row = tile.first_row + row_in_tile;
  if (walked.finishes || row >= tile.s.rows || (not_finite >> row_in_tile % 16 & 1) != 0) return;
  launch.states[workspace_row(launch, tile.s, tile.head, row)] = {rem, sum_g};
}

// The end of a warp of the tiled kernel.
template <typename Op, int kTiles>
__device__ inline void finish_grad_q(const BackwardLaunch& launch, const BlockInfo& tile, const ChunkWalk& keys,
                                     int row_in_tile, const BackwardRows<2>& rows, float (&grad_q)[kTiles][4],
                                     device::SharedAddress scratch) {
  using T = typename Storage<Op>::Type;
  using Tiles = BackwardDqShape<Op, 8 * kTiles>;
  if (device::kStepByStep<Op> && device::never(kTiles)) return;  // or registers run short for float, head dim 256
  constexpr bool kKeepInfo = Tiles::kRowBytes <= 256;            // where registers allow
  const BlockInfo done = kKeepInfo ? tile : BlockInfo::recompute(launch.params.problem, Tiles::kRows);
  const ChunkWalk walked = kKeepInfo ? keys : ChunkWalk(launch, done, Tiles::kRows);
  if (walked.finishes) scale(grad_q, launch.scale);
  const RoundedTile<T, kTiles> rounded(grad_q);
  const std::uint32_t not_finite = rows_not_finite(rounded);
  store_grad_q(launch, done, walked, row_in_tile, 0, grad_q, rounded, not_finite, scratch);
  const int lane = threadIdx.x & 31;
  if (lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_state(launch, done, walked, row_in_tile + lane / 4 + 8 * half, not_finite, rows.rem[half],
                  rows.sum_g[half]);
    }
  }
  row_by_row(not_finite, [&](int row) {
    backward_dq_row<Op, 8 * kTiles, Tiles::kKeys, kRunsOfSpan>(launch, done, walked, done.first_row + row_in_tile + row,
                                                               0);
  });
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
  copy.template rows<kRows>(queries, {p.q, p.q_strides, p, s, head, first_row}, launch.q_aligned);
  copy.template rows<kRows>(grads, {params.grad_o, params.grad_o_strides, p, s, head, first_row},
                            launch.grad_o_aligned);
  device::cp_async_commit();

  int key_tile = keys.newest_tile(kKeys);
  KvPipeline<Op, kRowBytes, kKeys, kStages, Tiles::kThreads, KvColumns::kOfK> kv(ring, copy, p, s, head, key_tile,
                                                                                 launch.k_aligned, launch.v_aligned);
  kv.prefetch(keys.begin < keys.end);

  const int row_in_tile = static_cast<int>(threadIdx.x / 32) * 16, warp_row = first_row + row_in_tile;
  Mask<kKeys> mask(p, s, warp_row);
  mask.prefetch(key_tile);
  const float v_norm = v_norm_max(launch, tile, keys);
  device::cp_async_wait<kStages - 1>();
  __syncthreads();
  float with_o[2], squares[2];
  grad_products<T, kRowBytes>(launch, s, head, warp_row, 0, grads + row_in_tile * kRowBytes, with_o, squares);

  BackwardRows<2> rows = begin_backward_rows(launch, tile, keys, warp_row, with_o, squares, v_norm);
  const Beta beta{-launch.factor};
  const device::SharedAddress query_rows = device::a_rows<kRowBytes>(queries + row_in_tile * kRowBytes);
  const device::SharedAddress grad_rows = device::a_rows<kRowBytes>(grads + row_in_tile * kRowBytes);

  // In registers for the whole walk, where they have room.
  const device::RowsA<kRowBytes, kDim <= 128 && device::kIs16Bit<Op>> q(query_rows);
  const device::RowsA<kRowBytes, kDim <= 64 && device::kIs16Bit<Op>> grad_o(grad_rows);

  float grad_q[kDim / 8][4] = {};
  if (!keys.starts) add_sums(launch, tile, row_in_tile, 0, grad_q);

  RunStatesOut<T, kKeys> run_states(launch, s, head, warp_row, key_tile);
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
        stick_break_backward<Op, masked>(scores, grad_weights, beta, visible, rows, run_states);
      });
      device::gemm_ab<Op, kRowBytes, InterleavedKeys>(grad_q, device::to_operand<Op>(grad_weights),
                                                      kv.columns(stage, width));
    });
    run_states.next();
  }
  device::cp_async_wait_all();

  finish_grad_q<Op>(launch, tile, keys, row_in_tile, rows, grad_q, queries + row_in_tile * kRowBytes);
}

}  // namespace mfx::stick
