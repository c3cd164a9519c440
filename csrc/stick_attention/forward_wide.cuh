// stick_attention forward for head dims above 256 (wide.cuh). A block owns 32 query rows (16 in binary32) of one
// K/V head and walks tiles of 16 keys, newest first. Per tile each warp, with its columns of Q in registers,
//
//   S_w = Q_w K_w^T,   S = sum_w S_w,   weights = scan(S),   O_w += weights V_w
//
// Two tiles per warp in shared memory: K and V, or, where K is V, which is then loaded once, this tile and the next. In
// all 81 KiB (137 KiB in binary32, more than sm_86 and sm_89 have).
#pragma once

#include "stick_attention/forward.cuh"
#include "stick_attention/wide.cuh"

namespace mfx::stick {

template <typename Op>
struct WideForwardShape : WideShape<Op> {
  static constexpr int kBlocksOf16 = sizeof(Op) == 2 ? 2 : 1;
  static constexpr int kRows = 16 * kBlocksOf16;
  static constexpr int kSharedBytes =
      WideShape<Op>::kTilesBytes + WideParts<Op, kBlocksOf16>::kBytes + kBlocksOf16 * WideShape<Op>::kOperandBytes;
};

template <typename Op>
__device__ inline void forward_wide(const ForwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Wide = WideForwardShape<Op>;
  constexpr int kKeys = Wide::kKeys, kRows = Wide::kRows, kM = Wide::kBlocksOf16;
  const StickAttentionForwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const BlockInfo tile(p, kRows, blockIdx.x);
  const Sequence& s = tile.s;
  if (tile.first_row >= s.rows) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, column = warp * Wide::kColumns;
  const device::SharedAddress tiles = device::shared_address(shared) + warp * (2 * Wide::kTileBytes);
  const WideParts<Op, kM> parts(reinterpret_cast<float*>(shared + Wide::kTilesBytes));
  const WideOperand<Op> weights(shared + Wide::kTilesBytes + parts.kBytes);

  WideRowsA<Op> q[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    q[m] = wide_rows<Op>(tiles, p, wide_query_rows<T>(p.q, p.q_strides, p, s, tile.head, tile.first_row + 16 * m),
                         launch.q_aligned);
  }

  // The row that this lane scans with seven others.
  const int row = warp * 4 + lane / Wide::kLanes;
  const bool scans = warp * 4 < kRows;
  float rem[1] = {tile.first_row + row < s.rows ? 1.0f : 0.0f};
  Mask<kKeys, 1, Wide::kLanes> mask(p, s, tile.first_row + warp * 4);
  const ExpLogit exp_logit{launch.factor};
  float o[kM][Wide::kColumnTiles][4] = {};

  const int newest_key = s.newest_key(p, min(tile.first_row + kRows, s.rows) - 1);
  int key_tile = newest_key < 0 ? -1 : newest_key / kKeys;
  WideKvPipeline<Op, KvColumns::kOfV, 2> kv(tiles, p, s, tile.head, key_tile, 0, launch.k_aligned, launch.v_aligned);
  mask.prefetch(key_tile);
  for (; key_tile >= 0; --key_tile) {
    kv.wait(key_tile);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float scores[2][4] = {};
      wide_gemm_abt<Op>(scores, q[m], kv.k());
      parts.store(m, scores);
    }
    kv.rows_read(key_tile);
    __syncthreads();  // all parts are there
    bool all_exhausted = true;
    if (scans) {
      float scores[1][2];
      parts.sum(row / 16, row % 16, scores);
      mask.take(key_tile);
      mask.apply(key_tile, mask.whole(), [&](auto masked, const Visible<1>& visible) {
        stick_break<masked, Wide::kLanes>(scores, exp_logit, visible, kWeightUnit<Op>, rem);
      });
      weights.put_run(row, scores);
      all_exhausted = exhausted(rem[0], launch.epsilon);
    }
    const bool last = __syncthreads_and(all_exhausted);  // and all weights
    const device::SharedAddress v = kv.columns();
#pragma unroll
    for (int m = 0; m < kM; ++m) wide_gemm_ab<Op>(o[m], weights(m), v);
    if (last) break;
    kv.columns_read(key_tile);
  }
  device::cp_async_wait_all();
  __syncwarp();

  const BlockInfo same_tile = BlockInfo::recompute(p, kRows);
  const int oldest_tile = max(key_tile, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    scale(o[m], 1.0f / kWeightUnit<Op>);
    store_output<Op>(launch, same_tile, 16 * m, column, o[m], tiles, oldest_tile * kKeys);
  }
  if (scans && lane % Wide::kLanes == 0 && same_tile.first_row + row < same_tile.s.rows) {
    const std::int64_t flat = flat_row(p, same_tile.s, same_tile.head, same_tile.first_row + row);
    static_cast<float*>(params.remainder)[flat] = rem[0];
    params.first_tiles[flat] = oldest_tile;
  }
}

}  // namespace mfx::stick
