// stick_attention backward, the query kernel (stick_backward.cuh): each warp with 16 rows of the tile, per key tile
//
//   S = Q K_tile^T,  dP = dO V_tile^T,  (weights, dS) = scan(S, dP) in the registers,  dQ += dS K_tile
//
// Shared memory: Q and dO, and a ring of kStages of K and V; Q's place takes dQ at the end.
#pragma once

#include "stick_attention/stick_backward.cuh"

namespace mfx {

// Per row of a warp: delta = do . o + dr r with o as it was before rounding, and what bounds sums of G: |sum of older
// G|
// <= stick * reach, with reach >= |do| max|v| + |dr|. Lanes (g, c) get those of rows g and g + 8; of rows behind the
// sequence's end they mean nothing.
template <typename T, int kRowBytes>
__device__ inline void stick_row_sums(const StickBackwardLaunch& launch, const StickSequence& s, std::int64_t head,
                                      int first_row, device::SharedAddress grad_rows, float longest, float (&delta)[2],
                                      float (&reach)[2]) {
  constexpr int kChunks = kRowBytes / 16, kLanes = kChunks < 32 ? kChunks : 32;  // that share a row
  constexpr int kRowsAtOnce = 32 / kLanes, kRounds = 16 / kRowsAtOnce;
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const int lane = threadIdx.x & 31, own_row = lane / kLanes;
  const T* const o = static_cast<const T*>(params.o);
  const StickRows<const T> rows(o, params.o_strides, p, s, head, first_row);
  const std::int64_t stride = rows.count >= 16 ? rows.stride(kRowsAtOnce) : 0;
  const T* const own = rows.at(own_row);
  const auto read = [&](const T* from, float (&x)[kElements]) {
    const uint4 words = launch.o_aligned ? device::load_global_128_constant(from) : stick_gather_chunk(from);
    device::unpack_chunk<T>(words, x);
  };
  float sums[2 * kRounds] = {};  // of each row do . o and do . do, of this lane's columns
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int row = round * kRowsAtOnce + own_row;
    const T* const source = stride != 0 ? own + round * stride : rows.at(min(row, rows.count - 1));
    for (int chunk = lane % kLanes; chunk < kChunks; chunk += kLanes) {
      const int column = chunk * kElements;
      if (column >= p.head_dim) break;
      float value[kElements], grad[kElements];
      read(source + column, value);
      if (params.residual != nullptr) {
        float lost[kElements];
        read(static_cast<const T*>(params.residual) + (source - o) + column, lost);
#pragma unroll
        for (int i = 0; i < kElements; ++i) value[i] += lost[i];
      }
      device::unpack_chunk<T>(device::load_shared_128(grad_rows + device::swizzled_offset<kRowBytes>(row, chunk)),
                              grad);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sums[2 * round] += grad[i] * value[i];
        sums[2 * round + 1] += grad[i] * grad[i];
      }
    }
  }
  device::sum_and_spread<kLanes, 2 * kRounds>(sums);  // lane 2 round + i of a row's lanes has sum i
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half, at = row % kRowsAtOnce * kLanes + row / kRowsAtOnce * 2;
    delta[half] = __shfl_sync(device::kAllLanes, sums[0], at);
    float most = 1.01f * sqrtf(__shfl_sync(device::kAllLanes, sums[0], at + 1) * longest);  // 1.01 for rounding
    if (params.grad_remainder != nullptr && row < rows.count) {
      const std::int64_t flat = stick_flat_row(p, s, head, first_row + row);
      const float grad = static_cast<const float*>(params.grad_remainder)[flat];
      delta[half] += grad * static_cast<const float*>(params.remainder)[flat];
      most += 1.01f * fabsf(grad);
    }
    // Where lengths overflow there is no bound, but 0 times it must be 0.
    reach[half] = most < 3.4e38f ? most : 3.4e38f;
  }
}

// The greatest |v|^2 of key tiles up to the newest, in all threads.
template <int kThreads>
__device__ inline float stick_longest(const float* lengths, int count, float* of_warps) {
  float longest = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) longest = fmaxf(longest, lengths[i]);
  longest = device::lanes_max(longest);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = longest;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) longest = fmaxf(longest, of_warps[i]);
  return longest;
}

template <typename Op, int kDim, int kSpan>
__device__ inline void stick_query_grad(const StickBackwardLaunch& launch) {
  using T = typename StickStorage<Op>::Type;
  using Tiles = StickQueryGradTiles<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kStages = Tiles::kStages, kRows = Tiles::kRows;
  constexpr int kKeyTiles = kKeys / 8;
  constexpr int kSpanLanes = 4 * kSpan / kKeys;  // lanes of a quad that share a span
  static_assert(kSpan <= kKeys, "spans end where tiles do");
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
  const device::SharedAddress queries = device::shared_address(shared), grads = queries + Tiles::kQueryBytes,
                              ring = grads + Tiles::kQueryBytes;
  const StickTileCopy<T, kRowBytes, Tiles::kThreads> copy(p.head_dim);
  copy.template rows<kRows>(queries, {static_cast<const T*>(p.q), p.q_strides, p, s, head, first_row},
                            launch.q_aligned);
  copy.template rows<kRows>(grads, {static_cast<const T*>(params.grad_o), params.grad_o_strides, p, s, head, first_row},
                            launch.grad_o_aligned);
  device::cp_async_commit();

  int key_tile = keys.newest_tile(kKeys);
  StickKeyWalk<T, kRowBytes, kKeys, Tiles::kThreads> walk(copy, p, s, head, key_tile, launch.k_aligned,
                                                          launch.v_aligned);
  device::SharedAddress target = ring;
  int to_other = (kStages - 1) * 2 * Tiles::kTileBytes;  // from a tile's place in the ring to the next one's
  if constexpr (kStages > 1) walk.next(target, keys.begin < keys.end);
  StickKeep<kKeys> keep(p, s);
  keep.load(key_tile * kKeys);

  const int lane = threadIdx.x & 31, row_in_tile = static_cast<int>(threadIdx.x / 32) * 16;
  const int warp_row = first_row + row_in_tile;
  const float longest = stick_longest<Tiles::kThreads>(
      launch.lengths + head * launch.length_slots + stick_length_slot(p, tile.slot.sequence),
      keys.newest_key < 0 ? 0 : keys.newest_key / kStickLengthKeys + 1,
      reinterpret_cast<float*>(shared + Tiles::kTilesBytes));
  device::cp_async_wait<kStages - 1>();
  __syncthreads();
  float delta[2], reach[2];
  stick_row_sums<T, kRowBytes>(launch, s, head, warp_row, grads + row_in_tile * kRowBytes, longest, delta, reach);

  // This lane's two rows, and its warp's first. A row behind the sequence's end has no stick.
  int newest[2];
  float stick[2], passed[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    newest[half] = s.newest_key(p, row);
    stick[half] = row < s.rows ? 1.0f : 0.0f;
    passed[half] = 0.0f;
    if (row < s.rows && !keys.starts) {
      const float2 state = launch.states[stick_workspace_row(launch, s, head, row)];
      stick[half] = state.x;
      passed[half] = state.y;
    }
  }
  const int warp_oldest = s.newest_key(p, warp_row);
  const StickBeta beta{-launch.factor};
  const device::SharedAddress query_rows = device::a_rows<kRowBytes>(queries + row_in_tile * kRowBytes);
  const device::SharedAddress grad_rows = device::a_rows<kRowBytes>(grads + row_in_tile * kRowBytes);

  // In registers for the whole walk, where they have room.
  const device::RowsA<kRowBytes, kDim <= 128 && device::kIs16Bit<Op>> q(query_rows);
  const device::RowsA<kRowBytes, kDim <= 64 && device::kIs16Bit<Op>> grad_o(grad_rows);

  // dQ in accumulator layout, at the same place for every window.
  float grad_q[kDim / 8][4] = {};
  const auto for_sums = [&](const StickRowTile& of, auto&& each) {
    const int row = of.first_row + row_in_tile + lane / 4;
    float* const sums = launch.sums + stick_workspace_row(launch, of.s, of.head, row) * p.head_dim;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half < of.s.rows && column < p.head_dim) {
          each(*reinterpret_cast<float2*>(sums + 8 * half * p.head_dim + column), grad_q[t][2 * half],
               grad_q[t][2 * half + 1]);
        }
      }
    }
  };
  if (!keys.starts) {
    for_sums(tile, [](const float2& sum, float& x, float& y) {
      x = sum.x;
      y = sum.y;
    });
  }

  device::SharedAddress key_rows = device::b_rows<kRowBytes>(ring);
  device::SharedAddress value_rows = walk.k_is_v ? key_rows : key_rows + Tiles::kTileBytes;
  device::SharedAddress key_columns = device::b_columns<Op, kRowBytes>(ring);
  // Where this lane leaves the state of row g at a span's edge; of row g + 8 eight further. Of the lanes of a span the
  // first leaves the sum of G over older keys, the last the stick.
  const bool notes_older = lane % kSpanLanes == 0, notes_stick = lane % kSpanLanes == kSpanLanes - 1;
  const std::int64_t spans = std::int64_t{(key_tile * kKeys - launch.window_begin) / kSpan + lane % 4 / kSpanLanes};
  const std::int64_t span_stride = p.heads * launch.rows;
  float* note = (notes_older ? launch.olders : launch.sticks) + spans * span_stride +
                stick_workspace_row(launch, s, head, warp_row + lane / 4);
  for (; key_tile * kKeys >= keys.begin; --key_tile) {
    if constexpr (kStages > 1) device::cp_async_wait<0>();
    __syncthreads();  // the tile is there for all, all are done with the one before, and its place is free
    if constexpr (kStages == 1) {
      walk.next(target, true);
      device::cp_async_wait<0>();
      __syncthreads();
    } else {
      target += to_other;
      walk.next(target, (key_tile - 1) * kKeys >= keys.begin);
    }
    const int first_key = key_tile * kKeys;
    const std::uint32_t kept = keep.run(first_key - kKeys);
    float scores[kKeyTiles][4] = {}, grad_weights[kKeyTiles][4] = {};
    device::multiply_rows<Op, kRowBytes>(scores, q, key_rows);
    device::multiply_rows<Op, kRowBytes>(grad_weights, grad_o, value_rows);
    float left[2];
    const auto scan = [&](auto masked, const std::uint32_t (&visible)[2]) {
      stick_scan_backward<Op, masked>(
          scores, grad_weights, beta, visible, stick,
          [&](int half, const device::QuadScan& newer) {
            left[half] =
                stick_left(newer, stick[half], [&] { return stick_sum(scores, half) * newer.later * stick[half]; });
          },
          [&](int half, float mass) {
            passed[half] += mass;
            const float most = left[half] * reach[half];
            return device::max_nan(-most, device::min_nan(most, delta[half] - passed[half]));
          },
          [&](int half, const device::QuadScan& newer, float older) {
            const bool notes = notes_older || notes_stick;
            const float value = notes_older ? older : stick[half] * newer.later;
            if (notes && warp_row + lane / 4 + 8 * half < s.rows) note[8 * half] = value;
            stick[half] = left[half];
          });
    };
    if (keep.all() && warp_oldest >= first_key + kKeys - 1) {
      scan(std::false_type{}, {});
    } else {
      scan(std::true_type{},
           {stick_visible<kKeys>(newest[0] - first_key, kept), stick_visible<kKeys>(newest[1] - first_key, kept)});
    }
    device::FragmentA grad_scores[device::steps_of_tiles<Op>(kKeyTiles)];
    device::pack_a<Op>(grad_scores, grad_weights);
    device::multiply_columns<Op, kRowBytes>(grad_q, grad_scores, key_columns);
    note -= kKeys / kSpan * span_stride;
    key_rows += to_other;
    value_rows += to_other;
    key_columns += to_other;
    to_other = -to_other;
  }
  device::cp_async_wait_all();

  const StickRowTile done = StickRowTile::again(p, kRows);
  if (keys.finishes) {
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_q[t][i] *= launch.scale;
    }
    const StickRows<T> rows(static_cast<T*>(params.grad_q), params.grad_q_strides, p, done.s, done.head,
                            done.first_row);
    stick_store_rows<T>(grad_q, queries + row_in_tile * kRowBytes, rows, row_in_tile, static_cast<int>(p.head_dim),
                        launch.grad_q_aligned);
  } else {
    for_sums(done, [](float2& sum, float x, float y) { sum = {x, y}; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = done.first_row + row_in_tile + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < done.s.rows) {
        launch.states[stick_workspace_row(launch, done.s, done.head, row)] = {stick[half], passed[half]};
      }
    }
  }
}

}  // namespace mfx
