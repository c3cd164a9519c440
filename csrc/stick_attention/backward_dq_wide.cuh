// stick_attention backward for head dims above 256, the dQ kernel (backward.cuh, wide.cuh): a block owns
// 16 rows. Per tile of 16 keys each warp, with its columns of Q and dO in registers,
//
//   S_w = Q_w K_w^T,  dP_w = dO_w V_w^T,  dS = scan(sum_w S_w, sum_w dP_w),  dQ_w += dS K_w
//
// In binary32 V must be K, and dO stays in shared memory.
#pragma once

#include "stick_attention/backward_dq.cuh"
#include "stick_attention/wide.cuh"

namespace mfx::stick {

template <typename Op>
struct WideBackwardDqShape : WideShape<Op> {
  static constexpr int kRows = 16;
  static constexpr bool kOne = sizeof(Op) == 4;  // K is V, and dO in the other tile: registers do not hold it
  static constexpr int kSharedBytes =
      WideShape<Op>::kTilesBytes + WideParts<Op, 2>::kBytes + WideShape<Op>::kOperandBytes;
};

template <typename Op>
__device__ inline void backward_dq_wide(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideBackwardDqShape<Op>;
  constexpr int kRowBytes = Wide::kRowBytes, kKeys = Wide::kKeys, kRows = Wide::kRows;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const BlockInfo tile(p, kRows, blockIdx.x);
  const Sequence& s = tile.s;
  if (tile.first_row >= s.rows) return;
  const ChunkWalk keys(launch, tile, kRows);
  if (!keys.any) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, column = warp * Wide::kColumns;
  const device::SharedAddress tiles = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  auto* const parts_of_s = reinterpret_cast<float*>(shared + Wide::kTilesBytes);
  const WideParts<Op, 2> parts(parts_of_s);
  const WideOperand<Op> grad_scores(shared + Wide::kTilesBytes + parts.kBytes);

  // Q, dO, and what a row's dO says of it: in registers or, where these do not hold dO, in the other tile.
  const auto rows_of = [&](const void* tensor, const StickQueryStrides& strides) {
    return wide_query_rows<T>(tensor, strides, p, s, tile.head, tile.first_row);
  };
  const WideRowsA<Op> q = wide_rows<Op>(tiles, p, rows_of(p.q, p.q_strides), launch.q_aligned);
  const device::SharedAddress grad_tile = tiles + (Wide::kOne ? Wide::kTileBytes : 0);
  wide_load<Op>(grad_tile, p, rows_of(params.grad_o, params.grad_o_strides), launch.grad_o_aligned);
  device::cp_async_wait_all();
  __syncwarp();
  const device::RowsA<kRowBytes, !Wide::kOne> grad_o(device::a_rows<kRowBytes>(grad_tile));
  const int row = (warp * 4 + lane / Wide::kLanes) % kRows;  // that this lane scans, in the first four warps
  const bool scans = warp * 4 < kRows, there = tile.first_row + row < s.rows;
  BackwardRows<1> state;
  {
    float with_o[2], squares[2];
    grad_products<T, kRowBytes>(launch, s, tile.head, tile.first_row, column, grad_tile, with_o, squares);
    auto* const sums = reinterpret_cast<float2*>(parts_of_s);
    if (lane % 4 == 0) {
      sums[warp * kRows + lane / 4] = {with_o[0], squares[0]};
      sums[warp * kRows + lane / 4 + 8] = {with_o[1], squares[1]};
    }
    const float v_norm = v_norm_max(launch, tile, keys);
    __syncthreads();  // the sums
    float2 sum = {0.0f, 0.0f};
    for (int w = 0; w < Wide::kWarps; ++w) {
      sum.x += sums[w * kRows + row].x;
      sum.y += sums[w * kRows + row].y;
    }
    const DeltaAndBound of_row(launch, s, tile.head, tile.first_row + row, sum.x, sum.y, v_norm);
    const float2 from = keys.starts || !there
                            ? make_float2(there ? 1.0f : 0.0f, 0.0f)
                            : launch.states[workspace_row(launch, s, tile.head, tile.first_row + row)];
    state = {{from.x}, {from.y}, {of_row.delta}, {of_row.dp_bound}};
    __syncthreads();  // the parts' place is free
  }
  float grad_q[Wide::kColumnTiles][4] = {};
  if (!keys.starts) add_sums(launch, tile, 0, column, grad_q);

  Mask<kKeys, 1, Wide::kLanes> mask(p, s, tile.first_row + warp * 4);
  const Beta beta{-launch.factor};
  int key_tile = keys.newest_tile(kKeys);
  WideKvPipeline<Op, KvColumns::kOfK, Wide::kOne ? 1 : 2> kv(tiles, p, s, tile.head, key_tile, keys.begin,
                                                             launch.k_aligned, launch.v_aligned);
  mask.prefetch(key_tile);
  for (; key_tile * kKeys >= keys.begin; --key_tile) {
    kv.wait(key_tile);
    {
      float scores[2][4] = {}, grad_weights[2][4] = {};
      wide_gemm_abt<Op>(scores, q, kv.k());
      wide_gemm_abt<Op>(grad_weights, grad_o, kv.v());
      parts.store(0, scores);
      parts.store(1, grad_weights);
    }
    kv.rows_read(key_tile);
    __syncthreads();  // all parts are there
    if (scans) {
      float scores[1][2], grad_weights[1][2];
      parts.sum(0, row, scores);
      parts.sum(1, row, grad_weights);
      mask.take(key_tile);
      mask.apply(key_tile, mask.whole(), [&](auto masked, const Visible<1>& visible) {
        stick_break_backward<Op, masked, Wide::kLanes>(
            scores, grad_weights, beta, visible, state, [&](int, const RunState& run) {
              // Of the tile: the stick at its newer edge, and the oldest lane's sum.
              if (there && lane % Wide::kLanes == 0) {
                *wide_run_state(launch, s, tile.head, key_tile * kKeys, tile.first_row + row) = {state.rem[0],
                                                                                                 run.older};
              }
            });
      });
      grad_scores.put_run(row, grad_weights);
    }
    __syncthreads();  // all dS are there
    wide_gemm_ab<Op>(grad_q, grad_scores(), kv.columns());
    kv.columns_read(key_tile);
  }
  device::cp_async_wait_all();
  __syncwarp();

  const BlockInfo done = BlockInfo::recompute(p, kRows);
  const ChunkWalk walked(launch, done, kRows);
  if (walked.finishes) scale(grad_q, launch.scale);
  const RoundedTile<T, Wide::kColumnTiles> rounded(grad_q);
  const std::uint32_t own = rows_not_finite(rounded);
  std::uint32_t not_finite = 0;  // for any warp
  if (__syncthreads_or(own != 0)) {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) not_finite |= __syncthreads_or(own >> i & 1) ? 1u << i : 0;
  }
  store_grad_q(launch, done, walked, 0, column, grad_q, rounded, not_finite, tiles);
  if (scans && lane % Wide::kLanes == 0) {
    store_state(launch, done, walked, row, not_finite, state.rem[0], state.sum_g[0]);
  }
  row_by_row(not_finite, [&](int i) {
    backward_dq_row<Op, Wide::kColumns, kKeys, 1>(launch, done, walked, done.first_row + i, column);
  });
}

}  // namespace mfx::stick
