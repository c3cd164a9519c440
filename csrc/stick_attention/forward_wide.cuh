// stick_attention forward for head dims above 256 (wide.cuh). A block owns 32 query rows (16 in binary32) of one
// K/V head and walks tiles of 16 keys, newest first. Per tile each warp, with its columns of Q in registers,
//
//   S_w = Q_w K_w^T,   S = sum_w S_w,   weights = scan(S),   O_w += weights V_w
//
// Two tiles per warp in shared memory: K and V, or, where K is V, which is then loaded once, this tile and the next. In
// all 83 KiB (137 KiB in binary32, more than sm_86 and sm_89 have).
#pragma once

#include "stick_attention/forward.cuh"
#include "stick_attention/wide.cuh"

namespace mfx::stick {

template <typename Op>
struct WideForwardShape : WideShape<Op> {
  static constexpr int kBlocksOf16 = sizeof(Op) == 2 ? 2 : 1;
  static constexpr int kRows = 16 * kBlocksOf16;
  using Wide = WideShape<Op>;
  static constexpr int kTilesBytes = Wide::kWarps * 2 * Wide::kTileBytes;
  static constexpr int kPartsBytes = Wide::kWarps * kBlocksOf16 * Wide::kPart * 4;
  static constexpr int kSharedBytes = kTilesBytes + kPartsBytes + kBlocksOf16 * Wide::kOperandBytes + kRows * 4;
};

template <typename Op>
__device__ inline void forward_wide(const ForwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideForwardShape<Op>;
  constexpr int kRowBytes = Wide::kRowBytes, kKeys = Wide::kKeys, kRows = Wide::kRows, kM = Wide::kBlocksOf16;
  constexpr float kUnit = kWeightUnit<Op>;
  const StickAttentionForwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const BlockInfo tile(p, kRows, blockIdx.x);
  const Sequence& s = tile.s;
  const int head = tile.head;
  const int first_row = tile.first_row;
  if (first_row >= s.rows) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const device::SharedAddress tiles = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  auto* const parts = reinterpret_cast<float*>(shared + Wide::kTilesBytes);
  std::uint8_t* const weights = shared + Wide::kTilesBytes + Wide::kPartsBytes;
  auto* const rems = reinterpret_cast<float*>(weights + kM * Wide::kOperandBytes);
  const int column = warp * Wide::kColumns, columns = static_cast<int>(p.head_dim) - column;

  const std::int64_t k_begin = s.batch * p.k_strides.batch + s.k_begin * p.k_strides.token + head * p.k_strides.head;
  const std::int64_t v_begin = s.batch * p.v_strides.batch + s.k_begin * p.v_strides.token + head * p.v_strides.head;
  const auto copy = [&](const void* tensor, std::int64_t begin, std::int64_t stride, int key_tile,
                        device::SharedAddress to, bool aligned) {
    const T* const from = static_cast<const T*>(tensor) + begin + column;
    wide_copy<T, kRowBytes>(to, columns, aligned, static_cast<const T*>(tensor), [&](int row) {
      const int key = key_tile * kKeys + row;
      return key >= 0 && key < s.keys ? from + key * stride : nullptr;
    });
  };
  const auto copy_k = [&](int key_tile, device::SharedAddress to) {
    copy(p.k, k_begin, p.k_strides.token, key_tile, to, launch.k_aligned);
  };
  const auto copy_v = [&](int key_tile, device::SharedAddress to) {
    copy(p.v, v_begin, p.v_strides.token, key_tile, to, launch.v_aligned);
  };

  device::FragmentA q[kM][Wide::kSteps];
  const QRows<const T> queries(static_cast<const T*>(p.q) + column, p.q_strides, p, s, head, first_row);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    wide_fragments<T, kRowBytes>(q[m], tiles, columns, launch.q_aligned, static_cast<const T*>(p.q),
                                 [&](int row) { return queries[16 * m + row]; });
  }
  if (threadIdx.x < kRows) rems[threadIdx.x] = first_row + static_cast<int>(threadIdx.x) < s.rows ? 1.0f : 0.0f;

  const int newest_key = s.newest_key(p, min(first_row + kRows, s.rows) - 1);
  const ExpLogit exp_logit{launch.factor};
  float o[kM][Wide::kColumnTiles][4] = {};
  device::SharedAddress now = tiles, other = tiles + Wide::kTileBytes;  // K and V, or this K and the next
  int key_tile = newest_key < 0 ? -1 : newest_key / kKeys;
  copy_k(key_tile, now);
  if (!p.k_is_v) copy_v(key_tile, other);
  __syncthreads();  // the sticks

  for (; key_tile >= 0; --key_tile) {
    if (p.k_is_v) copy_k(key_tile - 1, other);
    device::cp_async_wait<1>();  // K
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float scores[2][4] = {};
      wide_multiply<Op>(scores, q[m], now);
      wide_store_part(parts + (warp * kM + m) * Wide::kPart, scores);
    }
    __syncwarp();
    if (!p.k_is_v) copy_k(key_tile - 1, now);
    __syncthreads();

    bool ended = true;
    const int row = warp * 4 + lane / 8;
    if (row < kRows) {  // whole warps
      const float2 score = wide_sum(parts, kM * Wide::kPart, row);
      const int newest = first_row + row < s.rows ? s.newest_key(p, first_row + row) : -1;
      const WideVisible sees(p, s, key_tile * kKeys, newest);
      const WideScan scan(score, exp_logit, sees.older, sees.newer);
      const float rem = rems[row], share = rem * kUnit;
      auto* const older = weights + wide_operand<Op>(row, 2 * (lane % 8));
      if constexpr (sizeof(Op) == 2) {
        *reinterpret_cast<std::uint32_t*>(older) =
            device::pack_pair<Op>(scan.weight[0] * share, scan.weight[1] * share);
      } else {
        *reinterpret_cast<float*>(older) = scan.weight[0] * share;
        *reinterpret_cast<float*>(weights + wide_operand<Op>(row, 2 * (lane % 8) + 1)) = scan.weight[1] * share;
      }
      const float next_rem = scan.next_rem(rem);
      __syncwarp();
      if (lane % 8 == 0) rems[row] = next_rem;
      ended = exhausted(next_rem, launch.epsilon);
    }
    const bool last = __syncthreads_and(ended);

    device::cp_async_wait<1>();  // V; where K is V it has been there
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      wide_accumulate<Op>(o[m], weights + m * Wide::kOperandBytes, p.k_is_v ? now : other);
    }
    if (last) break;
    __syncwarp();
    if (p.k_is_v) {
      const device::SharedAddress used = now;
      now = other;
      other = used;
    } else {
      copy_v(key_tile - 1, other);
    }
  }
  device::cp_async_wait_all();

  const BlockInfo done = BlockInfo::recompute(p, kRows);
  key_tile = max(key_tile, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < Wide::kColumnTiles * 4; ++i) o[m][i / 4][i % 4] *= 1.0f / kUnit;
    const RoundedTile<T, Wide::kColumnTiles> rounded(o[m]);
    const std::uint32_t not_finite = rows_not_finite(rounded);
    const auto store = [&](void* to, const RoundedTile<T, Wide::kColumnTiles>& what, bool aligned) {
      const QRows<T> rows(static_cast<T*>(to) + column, params.o_strides, p, done.s, done.head, done.first_row);
      store_rows<T>(what, tiles, rows, 16 * m, columns, aligned);
    };
    store(params.o, rounded, launch.o_aligned);
    if constexpr (sizeof(T) == 2) {
      if (params.residual != nullptr) {
        rounded.take_from(o[m]);
        store(params.residual, RoundedTile<T, Wide::kColumnTiles>(o[m]), launch.residual_aligned);
      }
    }
    row_by_row(not_finite, [&](int row) {
      forward_row<Op, Wide::kColumns>(params, launch.factor, done, done.first_row + 16 * m + row, key_tile * kKeys,
                                      column);
    });
  }
  const int row = done.first_row + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kRows && row < done.s.rows) {
    const std::int64_t flat = flat_row(p, done.s, done.head, row);
    static_cast<float*>(params.remainder)[flat] = rems[threadIdx.x];
    params.first_tiles[flat] = key_tile;
  }
}

}  // namespace mfx::stick
