// stick_attention backward for head dims above 256, the dK/dV kernel (backward.cuh, wide.cuh): a block owns
// 16 keys of one K/V head and walks the query rows that visited them, 16 at a time. Each warp, with its columns of K
// and V in registers,
//
//   S_w^T = K_w Q_w^T,  dP_w^T = V_w dO_w^T,  (weights, dS) = scan(sum_w),  dV_w += weights^T dO_w,  dK_w += dS^T Q_w
//
// In binary32 only one of K and V and one gradient fit into registers: there V must be K, and both gradients of it are
// added up in one place.
#pragma once

#include "stick_attention/backward.cuh"
#include "stick_attention/wide.cuh"

namespace mfx::stick {

template <typename Op>
struct WideBackwardDkvShape : WideShape<Op> {
  using Wide = WideShape<Op>;
  static constexpr int kRows = 16;
  static constexpr bool kOne = sizeof(Op) == 4;  // K is V
  static constexpr int kTilesBytes = Wide::kWarps * 2 * Wide::kTileBytes;
  static constexpr int kPartsBytes = Wide::kWarps * 2 * Wide::kPart * 4;
  static constexpr int kSharedBytes = kTilesBytes + kPartsBytes + 2 * Wide::kOperandBytes;
};

// A warp's part of S from fragments of its transpose [keys, rows].
__device__ inline void wide_store_transposed_part(float* part, const float (&acc)[2][4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int key = i / 2 % 2 * 8 + lane / 4, row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    part[wide_score(row, key)] = acc[i / 4][i % 4];
  }
}

template <typename Op>
__device__ inline void backward_dkv_wide(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideBackwardDkvShape<Op>;
  constexpr int kRowBytes = Wide::kRowBytes, kKeys = Wide::kKeys, kRows = Wide::kRows;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const KvBlockInfo tile_of_keys(launch, kKeys, blockIdx.x);
  if (!tile_of_keys.any) return;
  const Sequence& s = tile_of_keys.s;
  const int head = tile_of_keys.head;
  const int first_key = tile_of_keys.first_key;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const device::SharedAddress query_tile = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  const device::SharedAddress grad_tile = query_tile + Wide::kTileBytes;
  auto* const parts = reinterpret_cast<float*>(shared + Wide::kTilesBytes);
  std::uint8_t* const weights_operand = shared + Wide::kTilesBytes + Wide::kPartsBytes;
  std::uint8_t* const grads_operand = weights_operand + Wide::kOperandBytes;
  const int column = warp * Wide::kColumns, columns = static_cast<int>(p.head_dim) - column;

  // K, and V where it may be another.
  device::FragmentA keys[Wide::kOne ? 1 : 2][Wide::kSteps];
  const auto load_keys = [&](device::FragmentA(&to)[Wide::kSteps], const void* tensor, const StickKeyStrides& strides,
                             bool aligned) {
    const T* const from = kv_pointer(static_cast<const T*>(tensor), strides, s, head) + column;
    wide_fragments<T, kRowBytes>(to, query_tile, columns, aligned, static_cast<const T*>(tensor), [&](int i) {
      return first_key + i < s.keys ? from + (first_key + i) * strides.token : nullptr;
    });
  };
  load_keys(keys[0], p.k, p.k_strides, launch.k_aligned);
  if constexpr (!Wide::kOne) load_keys(keys[1], p.v, p.v_strides, launch.v_aligned);

  const ExpLogit exp_logit{launch.factor};
  const int row = (warp * 4 + lane / 8) % kRows;  // that this lane scans, in the first four warps
  float grads[Wide::kOne ? 1 : 2][Wide::kColumnTiles][4] = {};

  // From the first row tile that sees a key on, those that forward took to this tile.
  const int first_position = first_key - s.history + (p.attend_current ? 0 : 1);
  const int first_tile = static_cast<int>(max(std::int64_t{first_position}, std::int64_t{0}) * p.group / kRows);
  for (int tile = first_tile; tile * kRows < s.rows; ++tile) {
    const int first_row = tile * kRows;
    if (first_visited_key(launch, s, head, first_row) > first_key) continue;
    const QRows<const T> q(static_cast<const T*>(p.q) + column, p.q_strides, p, s, head, first_row);
    const QRows<const T> grad_o(static_cast<const T*>(params.grad_o) + column, params.grad_o_strides, p, s, head,
                                first_row);
    wide_copy<T, kRowBytes>(query_tile, columns, launch.q_aligned, static_cast<const T*>(p.q),
                            [&](int i) { return q[i]; });
    wide_copy<T, kRowBytes>(grad_tile, columns, launch.grad_o_aligned, static_cast<const T*>(params.grad_o),
                            [&](int i) { return grad_o[i]; });
    device::cp_async_wait_all();
    __syncwarp();
    {
      float scores[2][4] = {}, grad_weights[2][4] = {};
      wide_multiply<Op>(scores, keys[0], query_tile);
      wide_multiply<Op>(grad_weights, keys[Wide::kOne ? 0 : 1], grad_tile);
      wide_store_transposed_part(parts + (2 * warp) * Wide::kPart, scores);
      wide_store_transposed_part(parts + (2 * warp + 1) * Wide::kPart, grad_weights);
    }
    __syncthreads();
    if (warp * 4 < kRows) {
      const float2 score = wide_sum(parts, 2 * Wide::kPart, row);
      const float2 grad_weight = wide_sum(parts + Wide::kPart, 2 * Wide::kPart, row);
      const bool there = first_row + row < s.rows;
      std::uint32_t first = first_key;  // what follows from it is computed here
      device::hide_from_optimizer(first);
      const std::int64_t at = (first - launch.chunk_begin) / kKeys * (p.heads * launch.rows) +
                              workspace_row(launch, s, head, first_row + row);
      const WideVisible sees(p, s, first_key, there ? s.newest_key(p, first_row + row) : -1);
      const bool visited = there && s.newest_key(p, min(first_row + kRows, s.rows) - 1) >= first_key;
      const ChunkState chunk_state = visited ? launch.chunk_states[at] : ChunkState{0.0f, 0.0f};
      const WideScan scan(score, exp_logit, sees.older, sees.newer);
      float2 weights;
      float2 grad =
          wide_gradients<Op>(scan, chunk_state.rem, grad_weight, weights, [&](float) { return chunk_state.older; });
      if constexpr (Wide::kOne) grad = {grad.x * launch.scale, grad.y * launch.scale};
      const int key = 2 * (lane % 8);
      wide_put<Op>(weights_operand, key, row, weights.x);
      wide_put<Op>(weights_operand, key + 1, row, weights.y);
      wide_put<Op>(grads_operand, key, row, grad.x);
      wide_put<Op>(grads_operand, key + 1, row, grad.y);
    }
    __syncthreads();
    wide_accumulate<Op>(grads[Wide::kOne ? 0 : 1], weights_operand, grad_tile);
    wide_accumulate<Op>(grads[0], grads_operand, query_tile);
    __syncwarp();
  }

  // Computed anew like the tile: from before the walk they would take registers all along.
  const KvBlockInfo done = KvBlockInfo::recompute(launch, kKeys);
  std::uint32_t own_warp = threadIdx.x / 32;
  device::hide_from_optimizer(own_warp);
  const int own_column = static_cast<int>(own_warp) * Wide::kColumns;
  const device::SharedAddress scratch = device::shared_address(shared) + own_warp * (2 * Wide::kTileBytes);
  const bool both = params.grad_v == nullptr;  // K is V
  if constexpr (!Wide::kOne) {
#pragma unroll
    for (int i = 0; i < 4 * Wide::kColumnTiles; ++i) {
      float &grad_k = grads[0][i / 4][i % 4], &grad_v = grads[1][i / 4][i % 4];
      grad_v *= 1.0f / kWeightUnit<Op>;
      grad_k = grad_k * launch.scale + (both ? grad_v : 0.0f);
    }
  }
  const RoundedTile<T, Wide::kColumnTiles> rounded_k(grads[0]), rounded_v(grads[Wide::kOne ? 0 : 1]);
  const std::uint32_t not_finite = rows_not_finite(rounded_k, rounded_v);
  const auto store = [&](const RoundedTile<T, Wide::kColumnTiles>& grad, void* tensor, const StickKeyStrides& strides,
                         bool aligned) {
    const KvRows<T> keys = {kv_pointer(static_cast<T*>(tensor), strides, done.s, done.head) + own_column, strides.token,
                            done.s.keys};
    store_rows<T>(grad, scratch, keys, done.first_key, static_cast<int>(p.head_dim) - own_column, aligned);
  };
  store(rounded_k, params.grad_k, params.grad_k_strides, launch.grad_k_aligned);
  if (!both) store(rounded_v, params.grad_v, params.grad_v_strides, launch.grad_v_aligned);
  row_by_row(not_finite, [&](int key) {
    backward_dkv_row<Op, Wide::kColumns, kKeys, 1>(launch, done.s, done.head, done.first_key + key, own_column);
  });
}

}  // namespace mfx::stick
