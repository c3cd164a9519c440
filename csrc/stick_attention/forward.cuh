// stick_attention forward, sm_80 and up: a block owns 64 query rows (positions and query heads of one K/V head) and
// walks their key tiles from the newest to the oldest, each warp with 16 or 32 rows:
//
//   S [16, keys]   = Q K_tile^T                  tensor cores, binary32 accumulators
//   weights        = scan(S) in the registers    stick_break.cuh
//   O [16, D]     += weights V_tile              the accumulators are this product's A fragments as they are
//
// K and V tiles come through a ring of kStages, one barrier per tile, which is also the vote on early exit. A K that is
// V is copied once. Shared memory: Q [64, D] and kStages of K and V [keys, D], swizzled; Q's place takes O at the end.
#pragma once

#include "stick_attention/epilogue.cuh"
#include "stick_attention/kv_pipeline.cuh"
#include "stick_attention/mask.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

struct ForwardLaunch {
  StickAttentionForwardParams params;
  float factor;   // scale * log2(e)
  float epsilon;  // exit_epsilon()
  bool q_aligned, k_aligned, v_aligned, o_aligned, residual_aligned;
};

template <typename Op, int kDim>
struct ForwardShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  // Times 16 rows per warp, which reads a tile once for all of them; as many as registers hold.
  static constexpr int kGroups = device::kIs16Bit<Op> && kDim <= 64 ? 2 : 1;
  static constexpr int kThreads = 32 * kStickTileRows / (16 * kGroups);
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;
  static constexpr int kQueryBytes = kStickTileRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTileBytes;
};

// The newest tile of kKeys that rows [first_row, first_row + rows) see; -1 if none.
template <int kKeys>
__device__ inline int newest_tile(const StickAttentionProblem& p, const Sequence& s, int first_row, int rows) {
  const int newest_key = s.newest_key(p, min(first_row + rows - 1, s.rows - 1));
  return newest_key < 0 ? -1 : newest_key / kKeys;
}

// Those of 16 of a warp's rows.
template <int kGroup, int kRows>
__device__ inline float (&sticks_of(float (&rem)[kRows]))[2] {
  return reinterpret_cast<float (&)[2]>(rem[2 * kGroup]);
}

// The sticks of a warp's 16 rows. A row beyond the sequence's end has none.
__device__ inline void begin_sticks(float (&rem)[2], const Sequence& s, int warp_row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rem[half] = warp_row + static_cast<int>(threadIdx.x & 31) / 4 + 8 * half < s.rows ? 1.0f : 0.0f;
  }
}

// The end of a warp's o: its columns from `column` on of 16 rows from `row_in_tile` on, whose walk ended at
// `oldest_key`. `scratch` is shared memory that nobody else reads.
template <typename Op, int kTiles>
__device__ inline void store_output(const ForwardLaunch& launch, const BlockInfo& tile, int row_in_tile, int column,
                                    float (&o)[kTiles][4], device::SharedAddress scratch, int oldest_key) {
  using T = typename Storage<Op>::Type;
  const StickAttentionForwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const RoundedTile<T, kTiles> rounded(o);
  const std::uint32_t not_finite = rows_not_finite(rounded);
  const auto store = [&](void* tensor, const RoundedTile<T, kTiles>& what, bool aligned) {
    const QRows<T> rows(tensor, params.o_strides, p, tile.s, tile.head, tile.first_row, column);
    store_rows<T>(what, scratch, rows, row_in_tile, static_cast<int>(p.head_dim) - column, aligned);
  };
  store(params.o, rounded, launch.o_aligned);
  if constexpr (sizeof(T) == 2) {
    if (params.residual != nullptr) {
      rounded.take_from(o);
      store(params.residual, RoundedTile<T, kTiles>(o), launch.residual_aligned);
    }
  }
  row_by_row(not_finite, [&](int row) {
    forward_row<Op, 8 * kTiles>(params, launch.factor, tile, tile.first_row + row_in_tile + row, oldest_key, column);
  });
}

// The end of the sticks of a warp, of 16 rows from `row_in_tile` on, whose walk ended at tile `oldest_tile`.
__device__ inline void store_sticks(const StickAttentionForwardParams& params, const BlockInfo& tile, int row_in_tile,
                                    const float (&rem)[2], int oldest_tile) {
  const int lane = threadIdx.x & 31;
  if (lane % 4 < 2) {  // lane 0 of a quad reports row g, lane 1 row g + 8
    const int row = tile.first_row + row_in_tile + lane / 4 + 8 * (lane % 4);
    if (row < tile.s.rows) {
      const std::int64_t flat = flat_row(params.problem, tile.s, tile.head, row);
      static_cast<float*>(params.remainder)[flat] = lane % 4 == 0 ? rem[0] : rem[1];
      params.first_tiles[flat] = oldest_tile;
    }
  }
}

template <typename Op, int kDim>
__device__ inline void forward(const ForwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Tiles = ForwardShape<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys;
  constexpr bool kKeepQueries = kRowBytes <= 256;  // in registers for the whole walk
  const StickAttentionForwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const BlockInfo tile(p, kStickTileRows, blockIdx.x);
  const Sequence& s = tile.s;
  const int head = tile.head;
  const int first_row = tile.first_row;
  if (first_row >= s.rows) return;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const device::SharedAddress queries = device::shared_address(shared), ring = queries + Tiles::kQueryBytes;
  const TileLoader<T, kRowBytes, Tiles::kThreads> copy(p.head_dim);
  copy.template rows<kStickTileRows>(queries, {p.q, p.q_strides, p, s, head, first_row}, launch.q_aligned);

  constexpr int kGroups = Tiles::kGroups;
  const int row_of_warp = static_cast<int>(threadIdx.x / 32) * (16 * kGroups), warp_row = first_row + row_of_warp;
  float rem[2 * kGroups];
  device::static_for<kGroups>([&](auto group) { begin_sticks(sticks_of<group>(rem), s, warp_row + 16 * group); });
  Mask<kKeys, 2 * kGroups> mask(p, s, warp_row);
  const ExpLogit exp_logit{launch.factor};
  const float epsilon = launch.epsilon;
  float o[kGroups][kDim / 8][4] = {};

  int key_tile = newest_tile<kKeys>(p, s, first_row, kStickTileRows);
  KvPipeline<Op, kRowBytes, kKeys, Tiles::kStages, Tiles::kThreads, KvColumns::kOfV> kv(
      ring, copy, p, s, head, key_tile, launch.k_aligned, launch.v_aligned);
  kv.prefetch(key_tile >= 0);
  mask.prefetch(key_tile);
  if constexpr (kKeepQueries) {
    device::cp_async_wait<0>();
    __syncthreads();
  }
  device::RowsA<kRowBytes, kKeepQueries> q[kGroups];
  device::static_for<kGroups>([&](auto group) {
    q[group] = device::RowsA<kRowBytes, kKeepQueries>(
        device::a_rows<kRowBytes>(queries + (row_of_warp + 16 * group) * kRowBytes));
  });
  for (; key_tile >= 0; --key_tile) {
    kv.wait();
    // A barrier, too: the tile is there for all, all are done with the one before, and its stage is free.
    if (block_exhausted(rem, epsilon)) break;
    const device::SharedAddress stage = kv.take(key_tile > 0);
    mask.take(key_tile);
    mask.with_visible_width(key_tile, [&](auto width) {
      float scores[width][4 * kGroups] = {};
      if constexpr (kGroups == 1) {
        device::gemm_abt<Op, kRowBytes, InterleavedKeys>(scores, q[0], kv.k_rows(stage, width));
      } else {
        device::gemm_abt_groups<Op, kRowBytes, InterleavedKeys>(scores, q, kv.k_rows(stage, width));
      }
      mask.apply(key_tile, width, [&](auto masked, const Visible<2 * kGroups>& visible) {
        stick_break<masked>(scores, exp_logit, visible, kWeightUnit<Op>, rem);
      });
      if constexpr (kGroups == 1) {
        device::gemm_ab<Op, kRowBytes, InterleavedKeys>(o[0], device::to_operand<Op>(scores), kv.columns(stage, width));
      } else {
        const device::OperandA<device::steps_of_tiles<Op>(width)> weights[] = {device::to_operand<Op, 0>(scores),
                                                                               device::to_operand<Op, 1>(scores)};
        device::gemm_ab_groups<Op, kRowBytes, InterleavedKeys>(o, weights, kv.columns(stage, width));
      }
    });
  }
  device::cp_async_wait_all();
  __syncthreads();  // where no tile was waited for, Q is on its way until here

  device::static_for<kGroups>([&](auto group) { scale(o[group], 1.0f / kWeightUnit<Op>); });
  const BlockInfo done = kKeepQueries ? tile : BlockInfo::recompute(p, kStickTileRows);  // where registers allow
  device::static_for<kGroups>([&](auto group) {
    const int row_in_tile = row_of_warp + 16 * group;
    store_output<Op>(launch, done, row_in_tile, 0, o[group], queries + row_in_tile * kRowBytes, (key_tile + 1) * kKeys);
    store_sticks(params, done, row_in_tile, sticks_of<group>(rem), key_tile + 1);
  });
}

}  // namespace mfx::stick
