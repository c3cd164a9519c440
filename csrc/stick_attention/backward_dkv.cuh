// stick_attention backward, the dK/dV kernel (backward.cuh): a block owns kKeys keys of one K/V head and walks the
// query rows that visited them, all query heads of the group among them, kRows at a time:
//
//   1. each warp, for 16 rows and one span of keys: S = Q K^T, dP = dO V^T, (weights, dS) = scan(S, dP), to shared
//   memory
//   2. each warp, for 16 keys and its part of D:    dV += weights^T dO, dK += dS^T Q
//
// Where 16 rows see none of 16 keys, step 2 leaves them out, and step 1 need not.
//
// Shared memory: K and V, kStages of Q and dO, weights and dS.
#pragma once

#include "stick_attention/mask.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

// Weights and score gradients between the two halves of a step: [rows, keys] in natural order. A lane writes its run of
// keys; chunks of a row are exchanged so that the lanes of a store (two rows of four runs of 16 or 32 bytes, four rows
// of 8) and those of a load (eight rows of a chunk, four of two) hit all banks. A lane's addresses differ by XOR in the
// 128 bytes that hold a chunk, else by immediate offsets.
template <typename Op, int kRowBytes>
struct ExchangeTile {
  __device__ static constexpr std::uint32_t turned(std::uint32_t row) { return (row ^ row << 2) & 7; }
  __device__ static std::uint32_t offset(std::uint32_t row, std::uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ turned(row)) << 4);
  }

  // Where this lane stores its run of row g of 16 rows.
  template <int kRun>
  __device__ static device::SharedAddress store_lane(device::SharedAddress tile, int first_row, int first_key) {
    constexpr int kBytes = static_cast<int>(sizeof(Op));
    const int lane = threadIdx.x & 31, byte = (first_key + lane % 4 * kRun) * kBytes;
    return tile + offset(first_row + lane / 4, byte / 16) + byte % 16;
  }

  // Stores the runs of rows g and g + 8, kOffset bytes behind the tile that `to` is in.
  template <int kOffset, int kTiles>
  __device__ static void store(device::SharedAddress to, const LaneRuns<Op, kTiles>& runs) {
    constexpr int kOfPair = sizeof(Op) / 2, kWords = kTiles * kOfPair;
    device::static_for<2>([&](auto half) {
      constexpr int kHalf = kOffset + half * 8 * kRowBytes;
      const auto word = [&](int i) { return runs[half][i / kOfPair].words[i % kOfPair]; };
      if constexpr (kWords == 2) {
        device::store_shared_64<kHalf>(to, {word(0), word(1)});
      } else {
        static_assert(kWords == 4 || kWords == 8, "at most two chunks, an even one first");
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          device::store_shared_128<kHalf>(to ^ (4 * i), {word(i), word(i + 1), word(i + 2), word(i + 3)});
        }
      }
    });
  }

  // Where this lane loads.
  __device__ static device::SharedAddress load_lane(device::SharedAddress tile, int first_key) {
    const int lane = threadIdx.x & 31, chunk = first_key * static_cast<int>(sizeof(Op)) / 16;
    if constexpr (sizeof(Op) == 2) return tile + offset((lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1));
    return tile + offset(lane % 4 * 2, chunk + lane / 16) + lane / 4 % 4 * 4;
  }

  // The transpose as an A fragment: 16 keys, inner dimension the rows, one step of them.
  template <int kOffset, int kStep>
  __device__ static void load(device::FragmentA& a, device::SharedAddress from) {
    if constexpr (sizeof(Op) == 2) {
      device::ldmatrix_x4_trans<kOffset + kStep * 16 * kRowBytes>(a, from);
    } else {
      device::static_for<4>([&](auto i) {  // (key g or g + 8, row 2c or 2c + 1)
        constexpr std::uint32_t kBits = i % 2 * 32 ^ turned(i / 2) * 16;
        a[i] = device::load_shared_32<kOffset + (kStep * 8 + i / 2) * kRowBytes>(from ^ kBits);
      });
    }
  }
};

template <typename Op, int kDim>
__device__ inline void backward_dkv(const BackwardLaunch& launch) {
  using T = typename Storage<Op>::Type;
  using Tiles = BackwardDkvShape<Op, kDim>;
  constexpr int kRowBytes = Tiles::kRowBytes, kKeys = Tiles::kKeys, kSpan = Tiles::kSpan, kRows = Tiles::kRows;
  constexpr int kThreads = Tiles::kThreads, kStages = Tiles::kStages;
  constexpr int kPartTiles = kDim / 8 / Tiles::kParts, kSteps = kRows / device::kStepElements<Op>;
  using Exchange = ExchangeTile<Op, Tiles::kExchangeRowBytes>;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;

  const KvBlockInfo tile_of_keys(launch, kKeys, blockIdx.x);
  if (!tile_of_keys.any) return;
  const Sequence& s = tile_of_keys.s;
  const int head = tile_of_keys.head;
  const int first_key = tile_of_keys.first_key;

  extern __shared__ __align__(1024) std::uint8_t shared[];
  const device::SharedAddress key_tile = device::shared_address(shared), value_tile = key_tile + Tiles::kKeyBytes,
                              ring = value_tile + Tiles::kKeyBytes,
                              exchange = ring + kStages * 2 * Tiles::kQueryBytes;  // weights, then dS
  const TileLoader<T, kRowBytes, kThreads> copy(p.head_dim);
  const auto copy_keys = [&](device::SharedAddress to, const void* tensor, const StickKeyStrides& strides,
                             bool aligned) {
    const std::int64_t step = copy.key_step(strides.token);
    const std::uint8_t* newest = copy.template newest_key<kKeys>(
        kv_pointer(static_cast<const T*>(tensor), strides, s, head, first_key), strides.token);
#pragma unroll
    for (int i = kKeys - kSpan; i >= 0; i -= kSpan) {
      copy.template keys<kSpan>(to + i * kRowBytes, newest, step, s.keys - first_key - i, aligned);
    }
  };
  copy_keys(key_tile, p.k, p.k_strides, launch.k_aligned);
  copy_keys(value_tile, p.v, p.v_strides, launch.v_aligned);
  device::cp_async_commit();

  const QRows<const T> q(static_cast<const T*>(p.q), p.q_strides, p, s, head, 0);
  const QRows<const T> grad_o(static_cast<const T*>(params.grad_o), params.grad_o_strides, p, s, head, 0);
  constexpr bool kOnce = device::kIs16Bit<Op>;  // find it once: of 32-bit types fragments need the registers
  const auto q_lane = copy.lane(q, launch.q_aligned), grad_lane = copy.lane(grad_o, launch.grad_o_aligned);
  std::int32_t easy = q_lane.step != 0 && grad_lane.step != 0;
  pin_if_16bit<T>(easy);
  const auto copy_queries = [&](int tile, device::SharedAddress to) {
    const auto q_now = kOnce ? q_lane : copy.lane(q, launch.q_aligned);
    const auto grad_now = kOnce ? grad_lane : copy.lane(grad_o, launch.grad_o_aligned);
    if (easy != 0 && (tile + 1) * kRows <= s.rows) {
      copy.template whole_rows<kRows>(to, q_now, tile);
      copy.template whole_rows<kRows, Tiles::kQueryBytes>(to, grad_now, tile);
    } else {
      copy.template rows<kRows>(to, q, launch.q_aligned, q_now, tile);
      copy.template rows<kRows>(to + Tiles::kQueryBytes, grad_o, launch.grad_o_aligned, grad_now, tile);
    }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row_in_tile = warp % (kRows / 16) * 16, span_in_tile = kSpan == kKeys ? 0 : warp / (kRows / 16) * kSpan;
  const int span_key = first_key + span_in_tile;
  const int lane_row = row_in_tile + lane / 4;
  // This lane's chunk state of the head's first row.
  const ChunkState* lane_states =
      launch.chunk_states +
      ((span_key - launch.chunk_begin) / kSpan * (p.heads * launch.rows) + workspace_row(launch, s, head, 0)) *
          kRunsOfSpan +
      lane % 4;
  pin_if_16bit<T>(lane_states);
  const Beta beta{-launch.factor};
  KeyPadding<kSpan> padding(p, s);
  padding.load(span_key);
  const auto kept = padding.bits();
  const int key_in_tile = warp % (kKeys / 16) * 16, part = warp / (kKeys / 16);
  float grad_k[kPartTiles][4] = {}, grad_v[kPartTiles][4] = {};

  // This lane's places in the tiles.
  device::SharedAddress query_lane = device::a_rows<kRowBytes>(row_in_tile * kRowBytes);
  const device::SharedAddress span_tile = key_tile + span_in_tile * kRowBytes;
  device::SharedAddress key_lane = span_tile + interleaved_rows<kRowBytes, kSpan / 4>(lane);
  device::SharedAddress column_lane = device::b_columns<Op, kRowBytes>(0) ^ (part * (kRowBytes / Tiles::kParts));
  device::SharedAddress store_lane = Exchange::template store_lane<kSpan / 4>(exchange, row_in_tile, span_in_tile);
  device::SharedAddress load_lane = Exchange::load_lane(exchange, key_in_tile);
  pin_if_16bit<T>(query_lane, key_lane, column_lane, store_lane, load_lane);
  const int group = static_cast<int>(p.group);
  const int span_row = s.first_row(p, span_key), key_row = s.first_row(p, first_key + key_in_tile);  // that see them

  const auto scan = [&](int tile, device::SharedAddress stage) {
    const int warp_row = tile * kRows + row_in_tile, last_row = min(warp_row + 16, s.rows) - 1;
    const int own_row = tile * kRows + lane_row;
    if (warp_row >= s.rows || last_row < span_row) return;
    // Of rows that are not there the last one's states: they see nothing, and need finite numbers.
    ChunkState chunk_states[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      chunk_states[half] = lane_states[min(own_row + 8 * half, s.rows - 1) * std::int64_t{kRunsOfSpan}];
    }
    const device::SharedAddress query_rows = stage + query_lane;
    with_visible_width<kSpan / 8>(last_row - span_row, group, [&](auto tiles) {
      constexpr bool kWhole = tiles == kSpan / 8;
      constexpr int kRun = 2 * tiles;
      const device::SharedAddress key_rows =
          kWhole ? key_lane : span_tile + interleaved_rows<kRowBytes, kRun>(recomputed_lane());
      float scores[tiles][4] = {}, grads[tiles][4] = {};
      device::gemm_abt<Op, kRowBytes, InterleavedKeys>(
          scores, [&](auto i, device::FragmentA& a) { device::load_a<i>(a, query_rows); }, key_rows);
      device::gemm_abt<Op, kRowBytes, InterleavedKeys>(
          grads, [&](auto i, device::FragmentA& a) { device::load_a<i>(a, query_rows + Tiles::kQueryBytes); },
          key_rows + Tiles::kKeyBytes);
      LaneRuns<Op, tiles> weights, grad_scores;
      if (kWhole && padding.all() && warp_row >= span_row + (kSpan - 1) * group && warp_row + 16 <= s.rows) {
        stick_break_runs<Op, false>(scores, grads, weights, grad_scores, beta, {}, chunk_states);
      } else {
        const auto newest = [&](int row) { return row < s.rows ? s.newest_key(p, row) - span_key : -1; };
        stick_break_runs<Op, true>(scores, grads, weights, grad_scores, beta,
                                   visible_runs<kRun, 4>({newest(own_row), newest(own_row + 8)}, kept), chunk_states);
      }
      const device::SharedAddress to =
          kWhole ? store_lane : Exchange::template store_lane<kRun>(exchange, row_in_tile, span_in_tile);
      Exchange::template store<0, tiles>(to, weights);
      Exchange::template store<Tiles::kExchangeBytes, tiles>(to, grad_scores);
    });
  };

  const auto accumulate = [&](int tile, device::SharedAddress stage) {
    const device::SharedAddress columns = stage + column_lane;
    const int first_row = tile * kRows;
    const auto multiply = [&](auto first, auto count) {  // steps
      constexpr int kFirst = first * device::kStepElements<Op> * kRowBytes;
      device::OperandA<count> a;
      device::static_for<count>([&](auto i) { Exchange::template load<0, first + i>(a.step[i], load_lane); });
      device::gemm_ab<Op, kRowBytes>(grad_v, a, columns + (Tiles::kQueryBytes + kFirst));
      device::static_for<count>(
          [&](auto i) { Exchange::template load<Tiles::kExchangeBytes, first + i>(a.step[i], load_lane); });
      device::gemm_ab<Op, kRowBytes>(grad_k, a, columns + kFirst);
    };
    if constexpr (device::kIs16Bit<Op>) {  // of 32-bit types one product after the other is long enough a code
      if (key_row < first_row + 16 && first_row + kRows - 16 < s.rows) {
        return multiply(std::integral_constant<int, 0>{}, std::integral_constant<int, kSteps>{});
      }
    }
    device::static_for<kSteps>([&](auto step) {
      const int rows = first_row + step * device::kStepElements<Op> / 16 * 16;
      if (rows < s.rows && key_row < min(rows + 16, s.rows)) multiply(step, std::integral_constant<int, 1>{});
    });
  };

  // Query tiles from the first that sees a key on, those that forward took to this tile: found kThreads at a time.
  auto* const live = reinterpret_cast<std::uint32_t*>(shared + Tiles::kTilesBytes);
  const int first_tile = max(s.first_row(p, first_key), 0) / kRows;
  const int end_tile = (s.rows + kRows - 1) / kRows;
  for (int chunk = first_tile; chunk < end_tile; chunk += kThreads) {
    const int mine = chunk + static_cast<int>(threadIdx.x);
    const bool alive = mine < end_tile && first_visited_key(launch, s, head, mine * kRows) <= first_key;
    const std::uint32_t word = __ballot_sync(device::kAllLanes, alive);
    __syncthreads();  // the words, the ring and the exchange of the chunk before are no longer read
    if (lane == 0) live[warp] = word;
    __syncthreads();
    int at = 0;
    std::uint32_t bits = live[0];
    const int words = (min(end_tile - chunk, kThreads) + 31) / 32;
    const auto next_live = [&] {  // kThreads if there is none
      while (bits == 0) {
        if (++at >= words) return kThreads;
        bits = live[at];
      }
      const int tile = 32 * at + __ffs(static_cast<int>(bits)) - 1;
      bits &= bits - 1;
      return tile;
    };
    device::SharedAddress stage = ring;
    std::uint32_t stages = 2 * ring + (kStages - 1) * 2 * Tiles::kQueryBytes;  // of the ring, added up
    device::pin_in_register(stages);
    int tile = next_live();
    if (kStages > 1 && tile < kThreads) copy_queries(chunk + tile, stage);
    device::cp_async_commit();
    while (tile < kThreads) {
      const int following = next_live();
      if constexpr (kStages == 1) {
        __syncthreads();  // all are done with the tile before
        copy_queries(chunk + tile, stage);
        device::cp_async_commit();
      }
      device::cp_async_wait<0>();
      __syncthreads();
      if constexpr (kStages > 1) {
        if (following < kThreads) copy_queries(chunk + following, stages - stage);
        device::cp_async_commit();
      }
      scan(chunk + tile, stage);
      __syncthreads();
      accumulate(chunk + tile, stage);
      if constexpr (kStages > 1) stage = stages - stage;
      tile = following;
    }
  }
  device::cp_async_wait_all();
  __syncthreads();

  const bool both = params.grad_v == nullptr;  // K is V
  const auto each = [&](auto&& change) {
#pragma unroll
    for (int i = 0; i < 4 * kPartTiles; ++i) change(grad_k[i / 4][i % 4], grad_v[i / 4][i % 4]);
  };
  each([&](float& of_k, float& of_v) {
    of_k *= launch.scale;
    of_v *= 1.0f / kWeightUnit<Op>;
  });
  if (both) each([](float& of_k, float of_v) { of_k += of_v; });
  const device::SharedAddress scratch = ring + warp * (16 * staging_row_bytes<T>(kPartTiles));
  const int first_column = part * (kDim / Tiles::kParts);
  const KvBlockInfo done = KvBlockInfo::recompute(launch, kKeys);
  const RoundedTile<T, kPartTiles> rounded_k(grad_k), rounded_v(grad_v);
  const std::uint32_t not_finite = rows_not_finite(rounded_k, rounded_v);
  const auto store = [&](const RoundedTile<T, kPartTiles>& grad, void* tensor, const StickKeyStrides& strides,
                         bool aligned) {
    const int first = done.first_key + key_in_tile;
    const KvRows<T> keys = {kv_pointer(static_cast<T*>(tensor), strides, done.s, done.head, first) + first_column,
                            strides.token, done.s.keys - first};
    store_rows<T>(grad, scratch, keys, 0, static_cast<int>(p.head_dim) - first_column, aligned);
  };
  store(rounded_k, params.grad_k, params.grad_k_strides, launch.grad_k_aligned);
  if (!both) store(rounded_v, params.grad_v, params.grad_v_strides, launch.grad_v_aligned);
  row_by_row(not_finite, [&](int key) {
    backward_dkv_row<Op, kDim / Tiles::kParts, kSpan, kRunsOfSpan>(launch, done.s, done.head,
                                                                   done.first_key + key_in_tile + key, first_column);
  });
}

}  // namespace mfx::stick
