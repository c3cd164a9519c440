// stick_attention backward, the query kernel (stick_backward.cuh): each warp with 16 rows of the tile, per key tile
//
//   S = Q K_tile^T,  dP = dO V_tile^T,  (weights, dS) = scan(S, dP) in the registers,  dQ += dS K_tile
//
// Shared memory: Q and dO, and a ring of kStages of K and V; Q's place takes dQ at the end.
#pragma once

#include "device/row_products.cuh"
#include "stick_attention/stick_backward.cuh"

namespace mfx {

// Per row of a warp: delta = do . o + dr r with o as it was before rounding, and what bounds sums of G: |sum of older
// G| <= stick * reach, with reach >= |do| max|v| + |dr|. Lanes (g, c) get those of rows g and g + 8; of rows behind the
// sequence's end they mean nothing.
template <typename T, int kRowBytes>
__device__ inline void stick_row_sums(const StickBackwardLaunch& launch, const StickSequence& s, std::int64_t head,
                                      int first_row, device::SharedAddress grad_rows, float longest, float (&delta)[2],
                                      float (&reach)[2]) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
  const StickRows<const T> rows(static_cast<const T*>(params.o), params.o_strides, p, s, head, first_row);
  const T* const own[2] = {rows.at(min(g, rows.count - 1)), rows.at(min(g + 8, rows.count - 1))};
  // Odd rows take their chunks of 64 bytes in exchanged pairs, so that a load from shared memory meets no bank twice.
  const device::SharedAddress grads = grad_rows + device::swizzled_offset<kRowBytes>(g, c + g % 2 * 4);
  const int first_column = (c + g % 2 * 4) * kElements;
  const auto read = [&](uint4(&x)[2], const void* tensor, int column) {
    const std::int64_t other = static_cast<const T*>(tensor) - static_cast<const T*>(params.o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* const from = own[half] + other + column;
      x[half] = column >= p.head_dim ? uint4{0, 0, 0, 0}
                : launch.o_aligned   ? device::load_global_128_constant(from)
                                     : stick_gather_chunk(from);
    }
  };
  device::RowProducts<T> with_o, squares;
  device::static_for<kRowBytes / 64>([&](auto i) {
    constexpr int kBits = i % 2 * 64, kOffset = i * 64 - kBits;
    const int column = (first_column ^ i % 2 * 4 * kElements) + i / 2 * 8 * kElements;
    const uint4 grad[2] = {device::load_shared_128<kOffset>(grads ^ kBits),
                           device::load_shared_128<kOffset + 8 * kRowBytes>(grads ^ kBits)};
    uint4 out[2];
    read(out, params.o, column);
    with_o.add(grad, out);
    squares.add(grad, grad);
    if (params.residual != nullptr) {
      read(out, params.residual, column);
      with_o.add(grad, out);
    }
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    delta[half] = with_o(half);
    float most = 1.01f * sqrtf(squares(half) * longest);  // 1.01 for rounding
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
  const int warp_oldest = s.newest_key(p, warp_row), warp_newest = s.newest_key(p, min(warp_row + 16, s.rows) - 1);
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

  const std::uint32_t value_tile = walk.k_is_v ? 0 : Tiles::kTileBytes;  // behind that of keys
  device::SharedAddress key_rows = stick_key_rows<kRowBytes, kKeys / 4>(ring);
  device::SharedAddress key_columns = stick_key_columns<Op, kRowBytes, kKeys / 4>(ring);
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
    const device::SharedAddress place = target;
    if constexpr (kStages == 1) {
      walk.next(target, true);
      device::cp_async_wait<0>();
      __syncthreads();
    } else {
      target += to_other;
      walk.next(target, (key_tile - 1) * kKeys >= keys.begin);
    }
    const int first_key = key_tile * kKeys;
    const auto kept = keep.bits(first_key - kKeys);
    const auto take = [&](auto tiles) {
    constexpr bool kWhole = tiles == kKeyTiles;
    constexpr int kRun = 2 * tiles;
    const device::SharedAddress rows = kWhole ? key_rows : stick_key_rows<kRowBytes, kRun>(place);
    float scores[tiles][4] = {}, grad_weights[tiles][4] = {};
    device::multiply_rows<Op, kRowBytes, StickKeyOrder>(scores, q, rows);
    device::multiply_rows<Op, kRowBytes, StickKeyOrder>(grad_weights, grad_o, rows + value_tile);
    StickRuns<Op, tiles> weights;
    float left[2];
    const auto scan = [&](auto masked, const std::uint32_t (&visible)[2]) {
      stick_scan_backward<Op, masked>(
          scores, grad_weights, weights, beta, visible, stick,
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
    if (kWhole && keep.all() && warp_oldest >= first_key + kKeys - 1) {
      scan(std::false_type{}, {});
    } else {
      scan(std::true_type{},
           {stick_visible<kRun>(newest[0] - first_key, kept), stick_visible<kRun>(newest[1] - first_key, kept)});
    }
    device::FragmentA grad_scores[device::steps_of_tiles<Op>(tiles)];
    device::pack_a<Op>(grad_scores, grad_weights);
    device::multiply_columns<Op, kRowBytes, StickKeyOrder>(
        grad_q, grad_scores, kWhole ? key_columns : stick_key_columns<Op, kRowBytes, kRun>(place));
    };
    if (warp_newest >= first_key) {
      if constexpr (kSpan == kKeys) {
        stick_take_oldest<kKeyTiles>(warp_newest - first_key, 1, take);
      } else {  // a span has the lanes that it has in whole tiles
        take(std::integral_constant<int, kKeyTiles>{});
      }
    }
    note -= kKeys / kSpan * span_stride;
    key_rows += to_other;
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
