// stick_attention backward for head dims above 256, the dK/dV kernel (backward.cuh, wide.cuh): a block owns
// 16 keys of one K/V head and walks the query rows that visited them, 16 at a time. Each warp, with its columns of K
// and V in registers,
//
//   S_w^T = K_w Q_w^T,  dP_w^T = V_w dO_w^T,  (weights, dS) = scan(sum_w),  dV_w += weights^T dO_w,  dK_w += dS^T Q_w
//
// In binary32 only one of K and V and one gradient fit into registers: there V must be K, and both gradients of it are
// added up in one place.
#pragma once

#include "stick_attention/backward_dkv.cuh"
#include "stick_attention/wide.cuh"

namespace mfx::stick {

template <typename Op>
struct WideBackwardDkvShape : WideShape<Op> {
  static constexpr int kRows = 16;
  static constexpr bool kOne = sizeof(Op) == 4;  // K is V
  static constexpr int kSharedBytes =
      WideShape<Op>::kTilesBytes + WideParts<Op, 2>::kBytes + 2 * WideShape<Op>::kOperandBytes;
};

template <typename Op>
__device__ inline void backward_dkv_wide(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideBackwardDkvShape<Op>;
  constexpr int kKeys = Wide::kKeys, kRows = Wide::kRows, kV = Wide::kOne ? 0 : 1;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const KvBlockInfo tile(launch, kKeys, blockIdx.x);
  if (!tile.any) return;
  const Sequence& s = tile.s;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const device::SharedAddress query_tile = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  const device::SharedAddress grad_tile = query_tile + Wide::kTileBytes;
  const WideParts<Op, 2> parts(reinterpret_cast<float*>(shared + Wide::kTilesBytes));
  const WideOperand<Op> weights(shared + Wide::kTilesBytes + parts.kBytes);
  const WideOperand<Op> grad_scores(shared + Wide::kTilesBytes + parts.kBytes + Wide::kOperandBytes);

  WideRowsA<Op> keys[kV + 1];  // K, and V where it may be another
  const auto load_keys = [&](const void* tensor, const StickKeyStrides& strides, bool aligned) {
    return wide_rows<Op>(query_tile, p, wide_key_rows<T>(tensor, strides, s, tile.head, tile.first_key), aligned);
  };
  keys[0] = load_keys(p.k, p.k_strides, launch.k_aligned);
  if constexpr (kV == 1) keys[kV] = load_keys(p.v, p.v_strides, launch.v_aligned);

  const int row = warp * 4 + lane / Wide::kLanes;  // that this lane scans, in the first four warps
  const Beta beta{-launch.factor};
  float grads[kV + 1][Wide::kColumnTiles][4] = {};  // dK and dV

  // From the first row tile that sees a key on, those that forward took to this tile.
  for (int first_row = max(s.first_row(p, tile.first_key), 0) / kRows * kRows; first_row < s.rows; first_row += kRows) {
    if (first_visited_key(launch, s, tile.head, first_row) > tile.first_key) continue;
    wide_load<Op>(query_tile, p, wide_query_rows<T>(p.q, p.q_strides, p, s, tile.head, first_row), launch.q_aligned);
    wide_load<Op>(grad_tile, p, wide_query_rows<T>(params.grad_o, params.grad_o_strides, p, s, tile.head, first_row),
                  launch.grad_o_aligned);
    device::cp_async_wait_all();
    __syncwarp();
    {
      float scores[2][4] = {}, grad_weights[2][4] = {};
      wide_gemm_abt<Op>(scores, keys[0], query_tile);
      wide_gemm_abt<Op>(grad_weights, keys[kV], grad_tile);
      parts.store_transposed(0, scores);
      parts.store_transposed(1, grad_weights);
    }
    __syncthreads();  // all parts are there
    if (warp * 4 < kRows) {
      const int warp_row = first_row + warp * 4;
      const KvBlockInfo same = KvBlockInfo::recompute(launch, kKeys);
      const SpanMask<kKeys, 1, Wide::kLanes> mask(p, same.s, same.first_key);
      float scores[1][2], grad_weights[1][2];
      parts.sum(0, row, scores);
      parts.sum(1, row, grad_weights);
      RunState of_tile = {0.0f, 0.0f};
      if (mask.any(warp_row)) {
        of_tile = *wide_run_state(launch, same.s, same.head, same.first_key, min(first_row + row, same.s.rows - 1));
      }
      BackwardRowOfState state = {{of_tile.rem}, of_tile.older};
      mask.apply(warp_row, mask.whole(), [&](auto masked, const Visible<1>& visible) {
        stick_break_backward<Op, masked, Wide::kLanes>(scores, grad_weights, beta, visible, state,
                                                       [](int, const RunState&) {});
      });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 2 * (lane % Wide::kLanes) + i;
        weights.put(key, row, scores[0][i]);
        grad_scores.put(key, row, Wide::kOne ? grad_weights[0][i] * launch.scale : grad_weights[0][i]);
      }
    }
    __syncthreads();  // all weights and dS are there
    wide_gemm_ab<Op>(grads[kV], weights(), grad_tile);
    wide_gemm_ab<Op>(grads[0], grad_scores(), query_tile);
    __syncwarp();
  }

  if constexpr (!Wide::kOne) scale_key_grads<Op>(launch, grads[0], grads[kV]);
  const int column = wide_column();
  store_key_grads<Op, kKeys, 1>(launch, KvBlockInfo::recompute(launch, kKeys), 0, column, grads[0], grads[kV],
                                device::shared_address(shared) + column / Wide::kColumns * (2 * Wide::kTileBytes));
}

}  // namespace mfx::stick
