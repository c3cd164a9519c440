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
  using Wide = WideShape<Op>;
  static constexpr int kRows = 16;
  static constexpr bool kOne = sizeof(Op) == 4;  // K is V, and dO in the other tile: registers do not hold it
  static constexpr int kTilesBytes = Wide::kWarps * 2 * Wide::kTileBytes;
  static constexpr int kPartsBytes = Wide::kWarps * 2 * Wide::kPart * 4;
  static constexpr int kSharedBytes = kTilesBytes + kPartsBytes + Wide::kOperandBytes + kRows * 16;
};

// One warp's share of do . o, with o as it was before rounding, and of |do|^2, of 16 rows.
template <typename T>
__device__ inline void wide_delta_and_norm(const BackwardLaunch& launch, const Sequence& s, std::int64_t head,
                                           int first_row, int column, int columns, float2* sums) {
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const auto rows_of = [&](const void* tensor, const StickQueryStrides& strides) {
    return QRows<const T>(static_cast<const T*>(tensor) + column, strides, p, s, head, first_row);
  };
  const auto grads = rows_of(params.grad_o, params.grad_o_strides), o = rows_of(params.o, params.o_strides);
  const auto lost = rows_of(params.residual, params.o_strides);
  for (int row = 0; row < 16; ++row) {
    float product = 0.0f, squares = 0.0f;
    const T* const grad_row = grads[row];
    for (int c = threadIdx.x & 31; grad_row != nullptr && c < min(columns, 128); c += 32) {
      const float grad = device::to_float(grad_row[c]);
      const float rest = params.residual == nullptr ? 0.0f : device::to_float(lost[row][c]);
      product += grad * (device::to_float(o[row][c]) + rest);
      squares += grad * grad;
    }
    product = device::lanes_sum(product);
    squares = device::lanes_sum(squares);
    if ((threadIdx.x & 31) == 0) sums[row] = make_float2(product, squares);
  }
}

template <typename Op>
__device__ inline void backward_dq_wide(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideBackwardDqShape<Op>;
  constexpr int kRowBytes = Wide::kRowBytes, kKeys = Wide::kKeys, kRows = Wide::kRows;
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const device::SharedAddress tiles = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  auto* const parts = reinterpret_cast<float*>(shared + Wide::kTilesBytes);
  std::uint8_t* const operand = shared + Wide::kTilesBytes + Wide::kPartsBytes;
  auto* const states = reinterpret_cast<float4*>(operand + Wide::kOperandBytes);  // stick, sum of G, delta, dp_bound
  const int column = warp * Wide::kColumns, columns = static_cast<int>(p.head_dim) - column;

  const auto keys_of = [&](const void* tensor, const StickKeyStrides& strides) {
    return kv_pointer(static_cast<const T*>(tensor), strides, s, head);
  };
  const auto copy = [&](const void* tensor, const StickKeyStrides& strides, int key_tile, device::SharedAddress to,
                        bool aligned) {
    const T* const from = keys_of(tensor, strides) + column;
    wide_copy<T, kRowBytes>(to, columns, aligned, static_cast<const T*>(tensor), [&](int row) {
      const int key = key_tile * kKeys + row;
      return key >= keys.begin && key < s.keys ? from + key * strides.token : nullptr;
    });
  };
  const auto copy_k = [&](int key_tile, device::SharedAddress to) {
    copy(p.k, p.k_strides, key_tile, to, launch.k_aligned);
  };
  const auto copy_v = [&](int key_tile, device::SharedAddress to) {
    copy(p.v, p.v_strides, key_tile, to, launch.v_aligned);
  };

  device::FragmentA q[Wide::kSteps], grad_o[Wide::kOne ? 1 : Wide::kSteps];
  const QRows<const T> queries(static_cast<const T*>(p.q) + column, p.q_strides, p, s, head, first_row);
  const QRows<const T> grads(static_cast<const T*>(params.grad_o) + column, params.grad_o_strides, p, s, head,
                             first_row);
  wide_fragments<T, kRowBytes>(q, tiles, columns, launch.q_aligned, static_cast<const T*>(p.q),
                               [&](int row) { return queries[row]; });
  const auto grad_row = [&](int row) { return grads[row]; };
  device::SharedAddress now = tiles, other = tiles + Wide::kTileBytes;  // K and V, this K and the next, or K and dO
  if constexpr (Wide::kOne) {
    wide_copy<T, kRowBytes>(other, columns, launch.grad_o_aligned, static_cast<const T*>(params.grad_o), grad_row);
  } else {
    wide_fragments<T, kRowBytes>(grad_o, tiles, columns, launch.grad_o_aligned, static_cast<const T*>(params.grad_o),
                                 grad_row);
  }

  // What the eight lanes of a row know of it, in the first four warps.
  const int row = (warp * 4 + lane / 8) % kRows;
  const bool scans = warp * 4 < kRows, there = first_row + row < s.rows;
  const auto at = [&] { return workspace_row(launch, s, head, first_row + row); };
  const int newest = there ? s.newest_key(p, first_row + row) : -1;
  {
    auto* const sums = reinterpret_cast<float2*>(parts);
    wide_delta_and_norm<T>(launch, s, head, first_row, column, columns, sums + warp * kRows);
    const float v_norm = v_norm_max(launch.v_norms + head * launch.norm_slots + norm_slot(p, tile.slot.sequence),
                                    keys.newest_key < 0 ? 0 : keys.newest_key / kNormKeys + 1);
    __syncthreads();  // the sums
    float delta = 0.0f, squares = 0.0f;
    for (int w = 0; w < Wide::kWarps; ++w) {
      delta += sums[w * kRows + row].x;
      squares += sums[w * kRows + row].y;
    }
    float dp_bound = 1.01f * sqrtf(squares * v_norm);  // 1.01 for rounding
    if (params.grad_remainder != nullptr && there) {
      const std::int64_t flat = flat_row(p, s, head, first_row + row);
      const float grad = static_cast<const float*>(params.grad_remainder)[flat];
      delta += grad * static_cast<const float*>(params.remainder)[flat];
      dp_bound += 1.01f * fabsf(grad);
    }
    dp_bound =
        dp_bound < 3.4e38f ? dp_bound : 3.4e38f;  // where lengths overflow there is no bound, but 0 times it must be 0
    const float2 from = keys.starts || !there ? make_float2(there ? 1.0f : 0.0f, 0.0f) : launch.states[at()];
    if (scans && lane % 8 == 0) states[row] = make_float4(from.x, from.y, delta, dp_bound);
    __syncthreads();
  }

  // dQ in accumulator layout, at the same place for every K/V chunk.
  float grad_q[Wide::kColumnTiles][4] = {};
  const auto for_sums = [&](const BlockInfo& of, std::uint32_t but, auto&& each) {
#pragma unroll
    for (int i = 0; i < 2 * Wide::kColumnTiles; ++i) {
      const int of_row = of.first_row + lane / 4 + 8 * (i % 2), c = 8 * (i / 2) + 2 * (lane % 4);
      if (of_row >= of.s.rows || c >= columns || (but >> (lane / 4 + 8 * (i % 2)) & 1) != 0) continue;
      const std::int64_t at = workspace_row(launch, of.s, of.head, of_row) * p.head_dim + column + c;
      each(*reinterpret_cast<float2*>(launch.sums + at), grad_q[i / 2][i % 2 * 2], grad_q[i / 2][i % 2 * 2 + 1]);
    }
  };
  if (!keys.starts) {
    for_sums(tile, 0, [](const float2& sum, float& x, float& y) {
      x = sum.x;
      y = sum.y;
    });
  }

  const ExpLogit exp_logit{launch.factor};
  int key_tile = keys.newest_tile(kKeys);
  const bool two_tiles_of_k = !Wide::kOne && p.k_is_v, tile_of_v = !Wide::kOne && !p.k_is_v;
  copy_k(key_tile, now);
  if (tile_of_v) copy_v(key_tile, other);
  for (; key_tile * kKeys >= keys.begin; --key_tile) {
    if (two_tiles_of_k) {
      copy_k(key_tile - 1, other);
      device::cp_async_wait<1>();
    } else {
      device::cp_async_wait<0>();
    }
    __syncwarp();
    {
      float scores[2][4] = {}, grad_weights[2][4] = {};
      wide_multiply<Op>(scores, q, now);
      if constexpr (Wide::kOne) {
        wide_multiply<Op>(grad_weights, other, now);
      } else {
        wide_multiply<Op>(grad_weights, grad_o, p.k_is_v ? now : other);
      }
      wide_store_part(parts + (2 * warp) * Wide::kPart, scores);
      wide_store_part(parts + (2 * warp + 1) * Wide::kPart, grad_weights);
    }
    __syncwarp();
    if (tile_of_v) copy_v(key_tile - 1, other);
    __syncthreads();
    if (scans) {
      const float2 score = wide_sum(parts, 2 * Wide::kPart, row);
      const float2 grad_weight = wide_sum(parts + Wide::kPart, 2 * Wide::kPart, row);
      const WideVisible sees(p, s, key_tile * kKeys, newest);
      const WideScan scan(score, exp_logit, sees.older, sees.newer);
      const float4 state = states[row];
      const float rem = state.x, next_rem = scan.next_rem(rem);
      float sum_g = state.y;
      const std::int64_t stage = (key_tile - launch.chunk_begin / kKeys) * (p.heads * launch.rows) + at();
      float2 weights;
      const float2 grad = wide_gradients<Op>(scan, rem, grad_weight, weights, [&](float of_tile) {
        sum_g += of_tile;
        const float most = next_rem * state.w;
        const float older = device::max_nan(-most, device::min_nan(most, state.z - sum_g));
        if (there && lane % 8 == 0) {
          launch.chunk_states[stage] = {rem, older};
        }
        return older;
      });
      __syncwarp();
      if (lane % 8 == 0) *reinterpret_cast<float2*>(&states[row]) = make_float2(next_rem, sum_g);
      wide_put<Op>(operand, row, 2 * (lane % 8), grad.x);
      wide_put<Op>(operand, row, 2 * (lane % 8) + 1, grad.y);
    }
    __syncthreads();
    wide_accumulate<Op>(grad_q, operand, now);
    __syncwarp();
    if (two_tiles_of_k) {
      const device::SharedAddress used = now;
      now = other;
      other = used;
    } else {
      copy_k(key_tile - 1, now);
    }
  }
  device::cp_async_wait_all();

  const BlockInfo done = BlockInfo::recompute(p, kRows);
  const ChunkWalk walked(launch, done, kRows);
  if (walked.finishes) {
#pragma unroll
    for (int i = 0; i < 4 * Wide::kColumnTiles; ++i) grad_q[i / 4][i % 4] *= launch.scale;
  }
  const RoundedTile<T, Wide::kColumnTiles> rounded(grad_q);
  const std::uint32_t own_spoilt = rows_not_finite(rounded);
  std::uint32_t not_finite = 0;  // for any warp
  if (__syncthreads_or(own_spoilt != 0)) {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) not_finite |= __syncthreads_or(own_spoilt >> i & 1) ? 1u << i : 0;
  }
  if (walked.finishes) {
    const QRows<T> rows(static_cast<T*>(params.grad_q) + column, params.grad_q_strides, p, done.s, done.head,
                        done.first_row);
    store_rows<T>(rounded, tiles, rows, 0, columns, launch.grad_q_aligned);
  } else {
    for_sums(done, not_finite, [](float2& sum, float x, float y) { sum = {x, y}; });
    if (scans && done.first_row + row < done.s.rows && lane % 8 == 0 && (not_finite >> row & 1) == 0) {
      const std::int64_t at = workspace_row(launch, done.s, done.head, done.first_row + row);
      launch.states[at] = {states[row].x, states[row].y};
    }
  }
  row_by_row(not_finite, [&](int i) {
    backward_dq_row<Op, Wide::kColumns, kKeys, 1>(launch, done, walked, done.first_row + i, column);
  });
}

}  // namespace mfx::stick
