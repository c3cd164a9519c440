// stick_attention forward, sm_80 and up: a block of four warps owns 64 query rows (positions and query heads of one K/V
// head) and walks their key tiles from the newest to the oldest, each warp with 16 rows:
//
//   S [16, keys]   = Q K_tile^T                  tensor cores, binary32 accumulators
//   weights        = scan(S) in the registers    stick_break.cuh
//   O [16, D]     += weights V_tile              the accumulators are this product's A fragments as they are
//
// K and V tiles come through a ring of kStages, one barrier per tile, which is also the vote on early exit. A K that is
// V is copied once. Shared memory: Q [64, D] and kStages of K and V [keys, D], swizzled; Q's place takes O at the end.
#pragma once

#include "stick_attention/epilogue.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

struct ForwardLaunch {
  StickAttentionForwardParams params;
  float factor;   // scale * log2(e)
  float epsilon;  // negative: never stop
  bool q_aligned, k_aligned, v_aligned, o_aligned, residual_aligned;
};

template <typename Op, int kDim>
struct ForwardShape {
  static constexpr int kThreads = 128;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Op));
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;
  static constexpr int kQueryBytes = kStickTileRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTileBytes;
};

template <typename Op, int kDim>
__device__ inline void forward(const ForwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Tiles = ForwardShape<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kStages = Tiles::kStages;
  constexpr int kKeyTiles = kKeys / 8;
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
  copy.template rows<kStickTileRows>(queries, {static_cast<const T*>(p.q), p.q_strides, p, s, head, first_row},
                                     launch.q_aligned);

  // This lane's two rows, and its warp's first and last. A row behind the sequence's end has no stick.
  const int lane = threadIdx.x & 31, warp_row = first_row + static_cast<int>(threadIdx.x / 32) * 16;
  int newest[2];
  float rem[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    newest[half] = s.newest_key(p, row);
    rem[half] = row < s.rows ? 1.0f : 0.0f;
  }
  const int warp_oldest = s.newest_key(p, warp_row);
  const int warp_newest = s.newest_key(p, min(warp_row + 15, s.rows - 1));
  const int newest_key = s.newest_key(p, min(first_row + kStickTileRows - 1, s.rows - 1));
  const ExpLogit exp_logit{launch.factor};
  const float epsilon = launch.epsilon;
  KeyPadding<kKeys> padding(p, s);

  const device::SharedAddress query_rows = device::a_rows<kRowBytes>(queries + threadIdx.x / 32 * (16 * kRowBytes));
  float o[kDim / 8][4] = {};

  int key_tile = newest_key < 0 ? -1 : newest_key / kKeys;
  KvPipeline<T, kRowBytes, kKeys, Tiles::kThreads> walk(copy, p, s, head, key_tile, launch.k_aligned, launch.v_aligned);
  const std::uint32_t value_tile = walk.k_is_v ? 0 : Tiles::kTileBytes;  // behind that of keys
  std::uint32_t key_rows = interleaved_rows<kRowBytes, kKeys / 4>(lane);
  std::uint32_t value_columns = interleaved_columns<Op, kRowBytes, kKeys / 4>(lane) + value_tile;
  device::pin_in_register(key_rows);
  device::pin_in_register(value_columns);
  device::SharedAddress next = ring;                                        // place of the tile that is met next
  std::uint32_t stages = 2 * ring + (kStages - 1) * 2 * Tiles::kTileBytes;  // of the ring, added up
  device::pin_in_register(stages);
  if constexpr (kStages > 1) walk.next(next, key_tile >= 0);
  padding.load(key_tile * kKeys);
  if constexpr (kKeepQueries) {
    device::cp_async_wait<0>();
    __syncthreads();
  }
  const device::RowsA<kRowBytes, kKeepQueries> q(query_rows);
  for (; key_tile >= 0; --key_tile) {
    if constexpr (kStages > 1) device::cp_async_wait<0>();
    // The tile is there for all, all are done with the one before, and its place is free. Are all sticks used up?
    if (device::barrier_all_at_most(rem[0], rem[1], epsilon)) break;
    const device::SharedAddress stage = next;
    if constexpr (kStages == 1) {
      walk.next(stage, true);
      device::cp_async_wait<0>();
      __syncthreads();
    } else {
      next = stages - stage;
      walk.next(next, key_tile > 0);
    }
    const int first_key = key_tile * kKeys;
    const auto kept = padding.bits(first_key - kKeys);
    if (warp_newest >= first_key) {
      with_visible_width<kKeyTiles>(warp_newest - first_key, 1, [&](auto tiles) {
        constexpr bool kWhole = tiles == kKeyTiles;
        constexpr int kRun = 2 * tiles;
        float scores[tiles][4] = {};
        device::multiply_rows<Op, kRowBytes, InterleavedKeys>(
            scores, q, stage + (kWhole ? key_rows : interleaved_rows<kRowBytes, kRun>(recomputed_lane())));
        if (kWhole && padding.all() && warp_oldest >= first_key + kKeys - 1) {
          stick_break<false>(scores, exp_logit, {}, kWeightUnit<Op>, rem);
        } else {
          const Visible visible = visible_runs<kRun>(newest[0] - first_key, newest[1] - first_key, kept);
          stick_break<true>(scores, exp_logit, visible, kWeightUnit<Op>, rem);
        }
        device::FragmentA weights[device::steps_of_tiles<Op>(tiles)];
        device::pack_a<Op>(weights, scores);
        device::multiply_columns<Op, kRowBytes, InterleavedKeys>(
            o, weights,
            stage +
                (kWhole ? value_columns : interleaved_columns<Op, kRowBytes, kRun>(recomputed_lane()) + value_tile));
      });
    }
  }
  device::cp_async_wait_all();
  __syncthreads();  // where no tile was waited for, Q is on its way until here

#pragma unroll
  for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[t][i] *= 1.0f / kWeightUnit<Op>;
  }
  const BlockInfo done = kKeepQueries ? tile : BlockInfo::recompute(p, kStickTileRows);  // where registers allow
  const int row_in_tile = static_cast<int>(threadIdx.x / 32) * 16;
  const RoundedTile<T, kDim / 8> rounded(o);
  const std::uint32_t not_finite = rows_not_finite(rounded);
  const device::SharedAddress scratch = queries + row_in_tile * kRowBytes;  // read by this warp only
  const auto store = [&](void* tensor, const RoundedTile<T, kDim / 8>& what, bool aligned) {
    const QRows<T> rows(static_cast<T*>(tensor), params.o_strides, p, done.s, done.head, done.first_row);
    store_rows<T>(what, scratch, rows, row_in_tile, static_cast<int>(p.head_dim), aligned);
  };
  store(params.o, rounded, launch.o_aligned);
  if constexpr (sizeof(T) == 2) {
    if (params.residual != nullptr) {
      rounded.take_from(o);
      store(params.residual, RoundedTile<T, kDim / 8>(o), launch.residual_aligned);
    }
  }
  row_by_row(not_finite, [&](int row) {
    forward_row<Op, kDim>(params, launch.factor, done, done.first_row + row_in_tile + row, (key_tile + 1) * kKeys, 0);
  });
  if (lane % 4 < 2) {  // lane 0 of a quad reports row g, lane 1 row g + 8
    const int row = done.first_row + row_in_tile + lane / 4 + 8 * (lane % 4);
    if (row < done.s.rows) {
      const std::int64_t flat = flat_row(p, done.s, done.head, row);
      static_cast<float*>(params.remainder)[flat] = lane % 4 == 0 ? rem[0] : rem[1];
      params.first_tiles[flat] = key_tile + 1;
    }
  }
}

}  // namespace mfx::stick
