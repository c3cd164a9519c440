// stick_attention backward for head dims above 256, the query kernel (stick_backward.cuh, stick_wide.cuh): a block owns
// 16 rows. Per tile of 16 keys each warp, with its columns of Q and dO in registers,
//
//   S_w = Q_w K_w^T,  dP_w = dO_w V_w^T,  dS = scan(sum_w S_w, sum_w dP_w),  dQ_w += dS K_w
//
// In binary32 V must be K, and dO stays in shared memory.
#pragma once

#include "stick_attention/stick_query_grad_kernel.cuh"
#include "stick_attention/stick_wide.cuh"

namespace mfx {

template <typename Op>
struct StickWideQueryGrad : StickWide<Op> {
  using Wide = StickWide<Op>;
  static constexpr int kRows = 16;
  static constexpr bool kOne = sizeof(Op) == 4;  // K is V, and dO in the other tile: registers do not hold it
  static constexpr int kTilesBytes = Wide::kWarps * 2 * Wide::kTileBytes;
  static constexpr int kPartsBytes = Wide::kWarps * 2 * Wide::kPart * 4;
  static constexpr int kSharedBytes = kTilesBytes + kPartsBytes + Wide::kOperandBytes + kRows * 16;
};

// One warp's share of do . o, with o as it was before rounding, and of |do|^2, of 16 rows.
template <typename T>
__device__ inline void stick_wide_row_sums(const StickBackwardLaunch& launch, const StickSequence& s, std::int64_t head,
                                           int first_row, int column, int columns, float2* sums) {
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const auto rows_of = [&](const void* tensor, const StickQueryStrides& strides) {
    return StickRows<const T>(static_cast<const T*>(tensor) + column, strides, p, s, head, first_row);
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
__device__ inline void stick_query_grad_wide(const StickBackwardLaunch& launch) {
  using T = typename StickStorage<Op>::Type;
  using Wide = StickWideQueryGrad<Op>;
  constexpr int kRowBytes = Wide::kRowBytes, kKeys = Wide::kKeys, kRows = Wide::kRows;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const StickRowTile tile(p, kRows, blockIdx.x);
  const StickSequence& s = tile.s;
  const int head = tile.head;
  const int first_row = tile.first_row;
  if (first_row >= s.rows) return;
  const StickWindowWalk keys(launch, tile, kRows);
  if (!keys.any) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const device::SharedAddress tiles = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  auto* const parts = reinterpret_cast<float*>(shared + Wide::kTilesBytes);
  std::uint8_t* const operand = shared + Wide::kTilesBytes + Wide::kPartsBytes;
  auto* const states = reinterpret_cast<float4*>(operand + Wide::kOperandBytes);  // stick, sum of G, delta, reach
  const int column = warp * Wide::kColumns, columns = static_cast<int>(p.head_dim) - column;

  const auto keys_of = [&](const void* tensor, const StickKeyStrides& strides) {
    return stick_keys(static_cast<const T*>(tensor), strides, s, head);
  };
  const auto copy = [&](const void* tensor, const StickKeyStrides& strides, int key_tile, device::SharedAddress to,
                        bool aligned) {
    const T* const from = keys_of(tensor, strides) + column;
    stick_wide_copy<T, kRowBytes>(to, columns, aligned, static_cast<const T*>(tensor), [&](int row) {
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
  const StickRows<const T> queries(static_cast<const T*>(p.q) + column, p.q_strides, p, s, head, first_row);
  const StickRows<const T> grads(static_cast<const T*>(params.grad_o) + column, params.grad_o_strides, p, s, head,
                                 first_row);
  stick_wide_fragments<T, kRowBytes>(q, tiles, columns, launch.q_aligned, static_cast<const T*>(p.q),
                                     [&](int row) { return queries[row]; });
  const auto grad_row = [&](int row) { return grads[row]; };
  device::SharedAddress now = tiles, other = tiles + Wide::kTileBytes;  // K and V, this K and the next, or K and dO
  if constexpr (Wide::kOne) {
    stick_wide_copy<T, kRowBytes>(other, columns, launch.grad_o_aligned, static_cast<const T*>(params.grad_o),
                                  grad_row);
  } else {
    stick_wide_fragments<T, kRowBytes>(grad_o, tiles, columns, launch.grad_o_aligned,
                                       static_cast<const T*>(params.grad_o), grad_row);
  }

  // What the eight lanes of a row know of it, in the first four warps.
  const int row = (warp * 4 + lane / 8) % kRows;
  const bool scans = warp * 4 < kRows, there = first_row + row < s.rows;
  const auto at = [&] { return stick_workspace_row(launch, s, head, first_row + row); };
  const int newest = there ? s.newest_key(p, first_row + row) : -1;
  {
    auto* const sums = reinterpret_cast<float2*>(parts);
    stick_wide_row_sums<T>(launch, s, head, first_row, column, columns, sums + warp * kRows);
    const float longest =
        stick_longest(launch.lengths + head * launch.length_slots + stick_length_slot(p, tile.slot.sequence),
                      keys.newest_key < 0 ? 0 : keys.newest_key / kStickLengthKeys + 1);
    __syncthreads();  // the sums
    float delta = 0.0f, squares = 0.0f;
    for (int w = 0; w < Wide::kWarps; ++w) {
      delta += sums[w * kRows + row].x;
      squares += sums[w * kRows + row].y;
    }
    float reach = 1.01f * sqrtf(squares * longest);  // 1.01 for rounding
    if (params.grad_remainder != nullptr && there) {
      const std::int64_t flat = stick_flat_row(p, s, head, first_row + row);
      const float grad = static_cast<const float*>(params.grad_remainder)[flat];
      delta += grad * static_cast<const float*>(params.remainder)[flat];
      reach += 1.01f * fabsf(grad);
    }
    reach = reach < 3.4e38f ? reach : 3.4e38f;  // where lengths overflow there is no bound, but 0 times it must be 0
    const float2 from = keys.starts || !there ? make_float2(there ? 1.0f : 0.0f, 0.0f) : launch.states[at()];
    if (scans && lane % 8 == 0) states[row] = make_float4(from.x, from.y, delta, reach);
    __syncthreads();
  }

  // dQ in accumulator layout, at the same place for every window.
  float grad_q[Wide::kColumnTiles][4] = {};
  const auto for_sums = [&](const StickRowTile& of, std::uint32_t but, auto&& each) {
#pragma unroll
    for (int i = 0; i < 2 * Wide::kColumnTiles; ++i) {
      const int of_row = of.first_row + lane / 4 + 8 * (i % 2), c = 8 * (i / 2) + 2 * (lane % 4);
      if (of_row >= of.s.rows || c >= columns || (but >> (lane / 4 + 8 * (i % 2)) & 1) != 0) continue;
      const std::int64_t at = stick_workspace_row(launch, of.s, of.head, of_row) * p.head_dim + column + c;
      each(*reinterpret_cast<float2*>(launch.sums + at), grad_q[i / 2][i % 2 * 2], grad_q[i / 2][i % 2 * 2 + 1]);
    }
  };
  if (!keys.starts) {
    for_sums(tile, 0, [](const float2& sum, float& x, float& y) {
      x = sum.x;
      y = sum.y;
    });
  }

  const StickOdds odds{launch.factor};
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
      stick_wide_multiply<Op>(scores, q, now);
      if constexpr (Wide::kOne) {
        stick_wide_multiply<Op>(grad_weights, other, now);
      } else {
        stick_wide_multiply<Op>(grad_weights, grad_o, p.k_is_v ? now : other);
      }
      stick_wide_store_part(parts + (2 * warp) * Wide::kPart, scores);
      stick_wide_store_part(parts + (2 * warp + 1) * Wide::kPart, grad_weights);
    }
    __syncwarp();
    if (tile_of_v) copy_v(key_tile - 1, other);
    __syncthreads();
    if (scans) {
      const float2 score = stick_wide_sum(parts, 2 * Wide::kPart, row);
      const float2 grad_weight = stick_wide_sum(parts + Wide::kPart, 2 * Wide::kPart, row);
      const StickWideSight sees(p, s, key_tile * kKeys, newest);
      const StickWideScan scan(score, odds, sees.older, sees.newer);
      const float4 state = states[row];
      const float stick = state.x, left = scan.left(stick);
      float passed = state.y;
      const std::int64_t place = (key_tile - launch.window_begin / kKeys) * (p.heads * launch.rows) + at();
      float2 weights;
      const float2 grad = stick_wide_gradients<Op>(scan, stick, grad_weight, weights, [&](float mass) {
        passed += mass;
        const float most = left * state.w;
        const float older = device::max_nan(-most, device::min_nan(most, state.z - passed));
        if (there && lane % 8 == 0) {
          launch.notes[place] = {stick, older};
        }
        return older;
      });
      __syncwarp();
      if (lane % 8 == 0) *reinterpret_cast<float2*>(&states[row]) = make_float2(left, passed);
      stick_wide_put<Op>(operand, row, 2 * (lane % 8), grad.x);
      stick_wide_put<Op>(operand, row, 2 * (lane % 8) + 1, grad.y);
    }
    __syncthreads();
    stick_wide_accumulate<Op>(grad_q, operand, now);
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

  const StickRowTile done = StickRowTile::again(p, kRows);
  if (keys.finishes) {
#pragma unroll
    for (int i = 0; i < 4 * Wide::kColumnTiles; ++i) grad_q[i / 4][i % 4] *= launch.scale;
  }
  const StickRounded<T, Wide::kColumnTiles> rounded(grad_q);
  const std::uint32_t own_spoilt = stick_rows_not_finite(rounded);
  std::uint32_t spoilt = 0;  // for any warp
  if (__syncthreads_or(own_spoilt != 0)) {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) spoilt |= __syncthreads_or(own_spoilt >> i & 1) ? 1u << i : 0;
  }
  if (keys.finishes) {
    const StickRows<T> rows(static_cast<T*>(params.grad_q) + column, params.grad_q_strides, p, done.s, done.head,
                            done.first_row);
    stick_store_rows<T>(rounded, tiles, rows, 0, columns, launch.grad_q_aligned);
  } else {
    for_sums(done, spoilt, [](float2& sum, float x, float y) { sum = {x, y}; });
    if (scans && done.first_row + row < done.s.rows && lane % 8 == 0 && (spoilt >> row & 1) == 0) {
      const std::int64_t at = stick_workspace_row(launch, done.s, done.head, done.first_row + row);
      launch.states[at] = {states[row].x, states[row].y};
    }
  }
  stick_row_by_row(spoilt, [&](int i) {
    stick_query_grad_row<Op, Wide::kColumns, kKeys, 1>(launch, done, keys, done.first_row + i, column, states[i].z,
                                                       states[i].w);
  });
}

}  // namespace mfx
