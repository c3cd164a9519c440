// stick_attention backward, the key kernel (stick_backward.cuh): a block owns kKeys keys of one K/V head and walks the
// query rows that visited them, all query heads of the group among them, kRows at a time:
//
//   1. each warp, for 16 rows and one span of keys: S = Q K^T, dP = dO V^T, (weights, dS) = scan(S, dP), to shared
//   memory
//   2. each warp, for 16 keys and its part of D:    dV += weights^T dO, dK += dS^T Q
//
// Shared memory: K and V, kStages of Q and dO, weights and dS.
#pragma once

#include "stick_attention/stick_backward.cuh"

namespace mfx {

// Weights and score gradients between the two halves of a step: [rows, keys] in natural order. A lane writes its run of
// keys; rows are rotated so that eight lanes of a store, two rows of four runs, and eight rows of a load hit all banks.
template <typename Op, int kSpan, int kRowBytes>
struct StickExchange {
  static constexpr int kRunBytes = kSpan / 4 * static_cast<int>(sizeof(Op));
  static constexpr int kTurn = kRunBytes == 32 ? 0 : kRunBytes == 16 ? 2 : 1;

  __device__ static std::uint32_t offset(std::uint32_t row, std::uint32_t chunk) {
    const std::uint32_t x = row & 7, turned = (x << kTurn | x >> (3 - kTurn)) & 7;
    return row * kRowBytes + ((chunk ^ turned) << 4);
  }

  // A warp's [16, kSpan], keys in slots.
  template <int kTiles>
  __device__ static void store(device::SharedAddress tile, int first_row, int first_key, const float (&x)[kTiles][4]) {
    const int lane = threadIdx.x & 31;
    const int byte = (first_key + lane % 4 * (kSpan / 4)) * static_cast<int>(sizeof(Op));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      std::uint32_t words[kRunBytes / 4];
#pragma unroll
      for (int tile_ = 0; tile_ < kTiles; ++tile_) {
        if constexpr (sizeof(Op) == 2) {
          words[tile_] = device::pack_pair<Op>(x[tile_][2 * half], x[tile_][2 * half + 1]);
        } else {
          words[2 * tile_] = __float_as_uint(x[tile_][2 * half]);
          words[2 * tile_ + 1] = __float_as_uint(x[tile_][2 * half + 1]);
        }
      }
      if constexpr (kRunBytes == 8) {
        device::store_shared_64(tile + offset(row, byte / 16) + byte % 16, {words[0], words[1]});
      } else {
#pragma unroll
        for (int i = 0; i < kRunBytes / 16; ++i) {
          device::store_shared_128(tile + offset(row, byte / 16 + i),
                                   {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
        }
      }
    }
  }

  // Its transpose as A fragments: 16 keys, inner dimension the rows.
  template <int kSteps>
  __device__ static void load(device::FragmentA (&a)[kSteps], device::SharedAddress tile, int first_key) {
    const int lane = threadIdx.x & 31;
    const int chunk = first_key * static_cast<int>(sizeof(Op)) / 16;
    if constexpr (sizeof(Op) == 2) {
      const device::SharedAddress rows = tile + offset((lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1));
      device::static_for<kSteps>([&](auto step) { device::ldmatrix_x4_trans<step * 16 * kRowBytes>(a[step], rows); });
    } else {
      const int g = lane / 4, c = lane % 4;
      device::static_for<kSteps>([&](auto step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // (key g or g + 8, row 2c or 2c + 1)
          const int row = step * 8 + 2 * c + i / 2;
          a[step][i] = device::load_shared_32(tile + offset(row, chunk + g / 4 + i % 2 * 2) + g % 4 * 4);
        }
      });
    }
  }
};

template <typename Op, int kDim>
__device__ inline void stick_key_grad(const StickBackwardLaunch& launch) {
  using T = typename StickStorage<Op>::Type;
  using Tiles = StickKeyGradTiles<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kSpan = Tiles::kSpan, kRows = Tiles::kRows;
  constexpr int kThreads = Tiles::kThreads, kStages = Tiles::kStages;
  constexpr int kPartTiles = kDim / 8 / Tiles::kParts, kSteps = kRows / device::kStepElements<Op>;
  using Exchange = StickExchange<Op, kSpan, Tiles::kExchangeRowBytes>;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const StickKeyTile tile_of_keys(launch, kKeys, blockIdx.x);
  if (!tile_of_keys.any) return;
  const StickSequence& s = tile_of_keys.s;
  const std::int64_t head = tile_of_keys.head;
  const int first_key = tile_of_keys.first_key;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const device::SharedAddress key_tile = device::shared_address(shared), value_tile = key_tile + Tiles::kKeyBytes,
                              ring = value_tile + Tiles::kKeyBytes,
                              weights_tile = ring + kStages * 2 * Tiles::kQueryBytes,
                              grads_tile = weights_tile + Tiles::kExchangeBytes;
  const StickTileCopy<T, kRowBytes, kThreads> copy(p.head_dim);
  const T* const k = stick_keys(static_cast<const T*>(p.k), p.k_strides, s, head);
  const T* const v = stick_keys(static_cast<const T*>(p.v), p.v_strides, s, head);
#pragma unroll
  for (int i = 0; i < kKeys / kSpan; ++i) {
    const int first = first_key + i * kSpan;
    const int there = s.keys - first;
    copy.template keys<kSpan>(key_tile + i * kSpan * kRowBytes,
                              copy.template key_source<kSpan>(k + first * p.k_strides.token, p.k_strides.token),
                              p.k_strides.token, there, launch.k_aligned);
    copy.template keys<kSpan>(value_tile + i * kSpan * kRowBytes,
                              copy.template key_source<kSpan>(v + first * p.v_strides.token, p.v_strides.token),
                              p.v_strides.token, there, launch.v_aligned);
  }
  device::cp_async_commit();

  const auto copy_queries = [&](int tile, device::SharedAddress to) {
    using Rows = typename decltype(copy)::Rows;
    copy.template rows<kRows>(
        Rows{to, {static_cast<const T*>(p.q), p.q_strides, p, s, head, tile * kRows}, launch.q_aligned},
        Rows{to + Tiles::kQueryBytes,
             {static_cast<const T*>(params.grad_o), params.grad_o_strides, p, s, head, tile * kRows},
             launch.grad_o_aligned});
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row_in_tile = warp % (kRows / 16) * 16, span_in_tile = warp / (kRows / 16) * kSpan;
  const int span_key = first_key + span_in_tile;
  // Of row g of the head's first 16 rows, at this span.
  const std::int64_t place = std::int64_t{(span_key - launch.window_begin) / kSpan} * (p.heads * launch.rows) +
                             stick_workspace_row(launch, s, head, row_in_tile + lane / 4);
  const StickOdds odds{launch.factor};
  StickKeep<kSpan> keep(p, s);
  keep.load(span_key);
  const std::uint32_t kept = keep.run();
  const int key_in_tile = warp % (kKeys / 16) * 16, part = warp / (kKeys / 16);
  float grad_k[kPartTiles][4] = {}, grad_v[kPartTiles][4] = {};

  // This lane's places in the tiles.
  const device::SharedAddress query_lane = device::a_rows<kRowBytes>(ring + row_in_tile * kRowBytes);
  const device::SharedAddress key_lane = device::b_rows<kRowBytes>(key_tile + span_in_tile * kRowBytes);
  const device::SharedAddress column_lane =
      device::b_columns<Op, kRowBytes>(ring) ^ (part * (kRowBytes / Tiles::kParts));

  const auto step = [&](int tile, device::SharedAddress stage) {
    const int warp_row = tile * kRows + row_in_tile;
    const int warp_newest = warp_row < s.rows ? s.newest_key(p, min(warp_row + 16, s.rows) - 1) : -1;
    if (warp_newest < span_key) {
      const float nothing[kSpan / 8][4] = {};
      Exchange::store(weights_tile, row_in_tile, span_in_tile, nothing);
      Exchange::store(grads_tile, row_in_tile, span_in_tile, nothing);
    } else {
      float stick[2], older[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = warp_row + lane / 4 + 8 * half < s.rows;
        const std::int64_t at = place + tile * kRows + 8 * half;
        stick[half] = there ? launch.sticks[at] : 0.0f;
        older[half] = there ? launch.olders[at] : 0.0f;
      }
      const device::SharedAddress query_rows = query_lane + (stage - ring);
      float scores[kSpan / 8][4] = {}, grads[kSpan / 8][4] = {};
      device::multiply_rows<Op, kRowBytes>(
          scores, [&](auto i, device::FragmentA& a) { device::load_a<i>(a, query_rows); }, key_lane);
      device::multiply_rows<Op, kRowBytes>(
          grads, [&](auto i, device::FragmentA& a) { device::load_a<i>(a, query_rows + Tiles::kQueryBytes); },
          key_lane + Tiles::kKeyBytes);
      const auto scan = [&](auto masked, const std::uint32_t (&visible)[2]) {
        stick_scan_backward<Op, masked>(
            scores, grads, odds, visible, stick, [](int, const device::QuadScan&) {},
            [&](int half, float) { return older[half]; }, [](int, const device::QuadScan&, float) {});
      };
      if (keep.all() && s.newest_key(p, warp_row) >= span_key + kSpan - 1) {
        scan(std::false_type{}, {});
      } else {
        const auto visible = [&](int row) {
          return row < s.rows ? stick_visible<kSpan>(s.newest_key(p, row) - span_key, kept) : 0;
        };
        scan(std::true_type{}, {visible(warp_row + lane / 4), visible(warp_row + lane / 4 + 8)});
      }
      Exchange::store(weights_tile, row_in_tile, span_in_tile, scores);
      Exchange::store(grads_tile, row_in_tile, span_in_tile, grads);
    }
    __syncthreads();

    device::FragmentA a[kSteps];
    const device::SharedAddress columns = column_lane + (stage - ring);
    Exchange::load(a, weights_tile, key_in_tile);
    device::multiply_columns<Op, kRowBytes>(grad_v, a, columns + Tiles::kQueryBytes);
    Exchange::load(a, grads_tile, key_in_tile);
    device::multiply_columns<Op, kRowBytes>(grad_k, a, columns);
  };

  // Query tiles from the first that sees a key on, those that forward took to this tile: found kThreads at a time.
  auto* const live = reinterpret_cast<std::uint32_t*>(shared + Tiles::kTilesBytes);
  const int first_position = first_key - s.history + (p.attend_current ? 0 : 1);
  const int first_tile = static_cast<int>(max(std::int64_t{first_position}, std::int64_t{0}) * p.group / kRows);
  const int end_tile = (s.rows + kRows - 1) / kRows;
  for (int chunk = first_tile; chunk < end_tile; chunk += kThreads) {
    const int mine = chunk + static_cast<int>(threadIdx.x);
    const bool alive = mine < end_tile && stick_first_key(launch, s, head, mine * kRows) <= first_key;
    const std::uint32_t word = __ballot_sync(device::kAllLanes, alive);
    __syncthreads();  // the words, the ring and the exchange of the chunk before are no longer read
    if (lane == 0) live[warp] = word;
    __syncthreads();
    const auto next_live = [&](int from) {  // the first at or behind `from`, kThreads if there is none
      for (int i = from / 32; i < kThreads / 32; ++i) {
        const std::uint32_t bits = i == from / 32 ? live[i] & ~0u << from % 32 : live[i];
        if (bits != 0) return 32 * i + __ffs(static_cast<int>(bits)) - 1;
      }
      return kThreads;
    };
    device::SharedAddress stage = ring, next = ring + (kStages - 1) * (2 * Tiles::kQueryBytes);
    int tile = next_live(0);
    if (kStages > 1 && tile < kThreads) copy_queries(chunk + tile, stage);
    device::cp_async_commit();
    while (tile < kThreads) {
      const int following = next_live(tile + 1);
      if constexpr (kStages == 1) {
        __syncthreads();  // all are done with the tile before
        copy_queries(chunk + tile, stage);
        device::cp_async_commit();
      }
      device::cp_async_wait<0>();
      __syncthreads();
      if constexpr (kStages > 1) {
        if (following < kThreads) copy_queries(chunk + following, next);
        device::cp_async_commit();
      }
      step(chunk + tile, stage);
      if constexpr (kStages > 1) {
        const device::SharedAddress used = stage;
        stage = next;
        next = used;
      }
      tile = following;
    }
  }
  device::cp_async_wait_all();
  __syncthreads();

  const bool both = params.grad_v == nullptr;  // K is V
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      grad_v[t][i] *= 1.0f / kStickWeightUnit<Op>;
      grad_k[t][i] = grad_k[t][i] * launch.scale + (both ? grad_v[t][i] : 0.0f);
    }
  }
  const device::SharedAddress scratch = ring + warp * (16 * stick_store_bytes<T>(kPartTiles));
  const int first_column = part * (kDim / Tiles::kParts);
  const StickKeyTile done = StickKeyTile::again(launch, kKeys);
  const auto store = [&](const float (&grad)[kPartTiles][4], void* tensor, const StickKeyStrides& strides,
                         bool aligned) {
    T* const keys = stick_keys(static_cast<T*>(tensor), strides, done.s, done.head);
    stick_store_rows<T>(
        grad, scratch,
        [&](int row) -> T* {
          const int key = done.first_key + key_in_tile + row;
          return key < done.s.keys ? keys + key * strides.token + first_column : nullptr;
        },
        static_cast<int>(p.head_dim) - first_column, aligned);
  };
  store(grad_k, params.grad_k, params.grad_k_strides, launch.grad_k_aligned);
  if (!both) store(grad_v, params.grad_v, params.grad_v_strides, launch.grad_v_aligned);
}

}  // namespace mfx
