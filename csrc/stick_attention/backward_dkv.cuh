// stick_attention backward, the dK/dV kernel (backward.cuh): a block owns kKeys keys of one K/V head and walks the
// query rows that visited them, all query heads of the group among them, kRows at a time:
//
//   1. each warp, for 16 rows and one span of keys: S = Q K^T, dP = dO V^T, (weights, dS) = scan(S, dP), exchanged
//   2. each warp, for 16 keys and its part of D:    dV += weights^T dO, dK += dS^T Q
//
// Where 16 rows see none of 16 keys, step 1 leaves the exchange tile as it was and step 2 leaves them out.
//
// Shared memory: K and V, kStages of Q and dO, weights and dS.
#pragma once

#include "stick_attention/exchange_tile.cuh"
#include "stick_attention/kv_pipeline.cuh"
#include "stick_attention/mask.cuh"
#include "stick_attention/query_pipeline.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

// The states of this lane's runs, in a span of keys.
template <typename T, int kSpan>
class RunStates {
 public:
  __device__ RunStates(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int span_key)
      : rows_(s.rows),
        states_(launch.run_states +
                ((span_key - launch.chunk_begin) / kSpan * (launch.params.problem.heads * launch.rows) +
                 workspace_row(launch, s, head, 0)) *
                    kRunsOfSpan +
                threadIdx.x % 4) {
    pin_if_16bit<T>(states_);
  }

  // Of rows g and g + 8 from `row` on. Of rows that are not there the last one's: they see nothing, and need finite
  // numbers.
  __device__ void load(RunState (&states)[2], int row) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + static_cast<int>(threadIdx.x & 31) / 4 + 8 * half;
      states[half] = states_[min(own, rows_ - 1) * std::int64_t{kRunsOfSpan}];
    }
  }

 private:
  const int rows_;
  const RunState* states_;  // of the head's first row
};

// The steps of a tile of kRows rows that products over rows need, for keys that rows from `first_row` to `rows` see.
template <typename Op, int kRows>
struct StepsOfRows {
  int first_row, rows;

  // Calls multiply(first step, steps), constants.
  template <typename Multiply>
  __device__ void for_each(int row, Multiply&& multiply) const {
    constexpr int kSteps = kRows / device::kStepElements<Op>;
    if constexpr (device::kIs16Bit<Op>) {  // of 32-bit types one product after the other is long enough a code
      if (first_row < row + 16 && row + kRows - 16 < rows) {
        return multiply(std::integral_constant<int, 0>{}, std::integral_constant<int, kSteps>{});
      }
    }
    device::static_for<kSteps>([&](auto step) {
      const int begin = row + step * device::kStepElements<Op> / 16 * 16;
      if (begin < rows && first_row < min(begin + 16, rows)) multiply(step, std::integral_constant<int, 1>{});
    });
  }
};

// Sums over rows become gradients: of weights in their unit, and of ds / scale. Where K is V, dK takes both.
template <typename Op, int kTiles>
__device__ inline void scale_key_grads(const BackwardLaunch& launch, float (&grad_k)[kTiles][4],
                                       float (&grad_v)[kTiles][4]) {
  scale(grad_k, launch.scale);
  scale(grad_v, 1.0f / kWeightUnit<Op>);
  if (launch.params.grad_v != nullptr) return;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) grad_k[i / 4][i % 4] += grad_v[i / 4][i % 4];
}

// The end of a warp: its columns from `column` on of 16 keys from `key_in_tile` on. `scratch` is shared memory that
// nobody else reads.
template <typename Op, int kSpan, int kRuns, int kTiles>
__device__ inline void store_key_grads(const BackwardLaunch& launch, const KvBlockInfo& tile, int key_in_tile,
                                       int column, const float (&grad_k)[kTiles][4], const float (&grad_v)[kTiles][4],
                                       device::SharedAddress scratch) {
  using T = typename Storage<Op>::Type;
  const StickAttentionBackwardParams& params = launch.params;
  const int first = tile.first_key + key_in_tile, columns = static_cast<int>(params.problem.head_dim) - column;
  const RoundedTile<T, kTiles> rounded_k(grad_k), rounded_v(grad_v);
  const std::uint32_t not_finite = rows_not_finite(rounded_k, rounded_v);
  const auto store = [&](const RoundedTile<T, kTiles>& grad, void* tensor, const StickKeyStrides& strides,
                         bool aligned) {
    const KvRows<T> keys(tensor, strides, tile.s, tile.head, first, column);
    store_rows<T>(grad, scratch, keys, 0, columns, aligned);
  };
  store(rounded_k, params.grad_k, params.grad_k_strides, launch.grad_k_aligned);
  if (params.grad_v != nullptr) store(rounded_v, params.grad_v, params.grad_v_strides, launch.grad_v_aligned);
  row_by_row(not_finite, [&](int key) {
    backward_dkv_row<Op, 8 * kTiles, kSpan, kRuns>(launch, tile.s, tile.head, first + key, column);
  });
}

template <typename Op, int kDim>
__device__ inline void backward_dkv(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Tiles = BackwardDkvShape<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kSpan = Tiles::kSpan, kRows = Tiles::kRows;
  constexpr int kPartTiles = kDim / 8 / Tiles::kParts;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const KvBlockInfo tile_of_keys(launch, kKeys, blockIdx.x);
  if (!tile_of_keys.any) return;
  const Sequence& s = tile_of_keys.s;
  const int head = tile_of_keys.head;
  const int first_key = tile_of_keys.first_key;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const device::SharedAddress tiles = device::shared_address(shared);
  const TileLoader<T, kRowBytes, Tiles::kThreads> copy(p.head_dim);
  // What a warp does: scans 16 rows of each query tile over a span of keys, and adds up its part of 16 keys.
  const int warp = threadIdx.x / 32;
  const int row_in_tile = warp % (kRows / 16) * 16, span_in_tile = kSpan == kKeys ? 0 : warp / (kRows / 16) * kSpan;
  const int key_in_tile = warp % (kKeys / 16) * 16, part = warp / (kKeys / 16);
  const int span_key = first_key + span_in_tile;
  using Keys = KvTiles<Op, kRowBytes, kKeys, kSpan, Tiles::kThreads>;
  using Queries = QueryPipeline<Op, kRowBytes, kRows, Tiles::kStages, Tiles::kThreads>;
  const device::SharedAddress ring = tiles + Keys::kBytes;
  const Keys keys(tiles, copy, p, s, head, first_key, span_in_tile, launch.k_aligned, launch.v_aligned);
  const Queries queries(ring, reinterpret_cast<std::uint32_t*>(shared + Tiles::kTilesBytes), copy, launch, s, head,
                        row_in_tile, part * (kRowBytes / Tiles::kParts));
  const ExchangeTile<Op, kRows, Tiles::kExchangeRowBytes, kSpan> exchange(ring + Queries::kBytes, row_in_tile,
                                                                          span_in_tile, key_in_tile);
  const SpanMask<kSpan> mask(p, s, span_key);
  const RunStates<T, kSpan> run_states(launch, s, head, span_key);
  const StepsOfRows<Op, kRows> steps{s.first_row(p, first_key + key_in_tile), s.rows};
  const Beta beta{-launch.factor};
  float grad_k[kPartTiles][4] = {}, grad_v[kPartTiles][4] = {};

  queries.for_each_tile(first_key, [&](int first_row, device::SharedAddress stage) {
    const int warp_row = first_row + row_in_tile;
    if (mask.any(warp_row)) {
      RunState states[2];
      run_states.load(states, warp_row);
      mask.with_visible_width(warp_row, [&](auto width) {
        const auto kv = keys.rows(width);
        float scores[width][4] = {}, grad_weights[width][4] = {};
        device::gemm_abt<Op, kRowBytes, InterleavedKeys>(scores, queries.q(stage), kv.k);
        device::gemm_abt<Op, kRowBytes, InterleavedKeys>(grad_weights, queries.grad_o(stage), kv.v);
        LaneRuns<Op, width> weights, grad_scores;
        mask.apply(warp_row, width, [&](auto masked, const Visible<2>& visible) {
          stick_break_runs<Op, masked>(scores, grad_weights, weights, grad_scores, beta, visible, states);
        });
        exchange.store(width, weights, grad_scores);
      });
    }
    __syncthreads();
    steps.for_each(first_row, [&](auto first, auto count) {
      device::gemm_ab<Op, kRowBytes>(grad_v, exchange.weights(first, count), queries.grad_o_columns(stage, first));
      device::gemm_ab<Op, kRowBytes>(grad_k, exchange.grad_scores(first, count), queries.q_columns(stage, first));
    });
  });

  scale_key_grads<Op>(launch, grad_k, grad_v);
  store_key_grads<Op, kSpan, kRunsOfSpan>(launch, KvBlockInfo::recompute(launch, kKeys), key_in_tile,
                                          part * (kDim / Tiles::kParts), grad_k, grad_v,
                                          ring + warp * (16 * staging_row_bytes<T>(kPartTiles)));
}

}  // namespace mfx::stick
