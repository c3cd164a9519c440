// stick_attention backward on sm_90a, the dK/dV kernel: backward_dkv.cuh with the products of a warpgroup. A block owns
// 128 keys of one K/V head, 64 for each of two warpgroups, and a third one loads the query tiles that see them
// (query_ring.cuh), 64 rows at a time:
//
//   S [64, 64] = Q K^T,  dP = dO V^T     wgmma, all from shared memory
//   (weights, dS) = scan(S, dP)          each lane its run of 16 keys, from the run states, with nobody else
//   dV += weights^T dO,  dK += dS^T Q    wgmma; both operands have a row of shared memory per element of depth
//
// The scan's results go through shared memory of the warpgroup's own, whose two barriers per tile are all. The sums are
// under way until the next scores are there; then the stage of their Q and dO is free. While one warpgroup scans the
// other multiplies.
#pragma once

#include "stick_attention/backward_dkv.cuh"
#include "stick_attention/hopper/kv_boxes.cuh"
#include "stick_attention/hopper/query_ring.cuh"
#include "tile/warpgroup_product.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::stick {

// A box of weights and one of dS, 64 rows and keys, of which this lane has its run of rows g and g + 8 of its warp's.
template <typename Op>
class WarpgroupExchange {
  static constexpr int kBoxBytes = kStickTileRows * device::kBoxRowBytes;

 public:
  static constexpr int kBytes = 2 * kBoxBytes;

  __device__ WarpgroupExchange(device::SharedAddress boxes, int warp_row)
      : boxes_(boxes),
        own_(boxes +
             device::swizzled_offset<device::kBoxRowBytes>(
                 warp_row + static_cast<int>(threadIdx.x & 31) / device::kQuad, threadIdx.x % device::kQuad * 2)) {}

  // Of tiles of 8 keys from the `first` of this lane's on.
  template <typename First, int kTiles>
  __device__ void store(First first, const LaneRuns<Op, kTiles>& weights,
                        const LaneRuns<Op, kTiles>& grad_scores) const {
    store_runs<0, first>(weights);
    store_runs<kBoxBytes, first>(grad_scores);
  }
  __device__ device::SharedAddress weights() const { return boxes_; }
  __device__ device::SharedAddress grad_scores() const { return boxes_ + kBoxBytes; }

 private:
  template <int kOffset, int kFirst, int kTiles>
  __device__ void store_runs(const LaneRuns<Op, kTiles>& runs) const {
    device::static_for<2>([&](auto half) {
      device::static_for<kTiles / 4>([&](auto chunk) {
        const auto word = [&](int i) { return runs[half][4 * chunk + i].words[0]; };
        device::store_shared_128<kOffset + half * 8 * device::kBoxRowBytes>(own_ ^ (kFirst / 4 + chunk) * 16,
                                                                            {word(0), word(1), word(2), word(3)});
      });
    });
  }

  const device::SharedAddress boxes_, own_;
};

// The states of this lane's 16 keys, from those of a tile in shared memory. The dQ kernel left kRunsOfSpan per kSpan
// keys, of which 16 have kRuns, or, where the 16 rows of a warp see but the oldest half or quarter of a span, per that.
// What is one run here and several there has the stick of the newest of these, and the sum of G of the oldest.
template <typename Ring>
class LaneRunStates {
  static constexpr int kKeys = kWarpgroupKeys / device::kQuad, kSpan = Ring::kSpan;
  static constexpr int kRun = kSpan / kRunsOfSpan;

 public:
  static constexpr int kRuns = kKeys / kRun;
  static_assert(kRuns == 1 || kRuns == 2, "read at once");
  using States = RunState[kRuns][2];  // of rows g and g + 8

  // Of rows of a warp from `warp_row` in the tile on, and keys of a warpgroup.
  __device__ LaneRunStates(int consumer, int warp_row)
      : own_((consumer * kWarpgroupKeys + lane_key()) / kSpan * Ring::kStatesOfSpan +
             (warp_row + static_cast<int>(threadIdx.x & 31) / device::kQuad) * Ring::kStatesOfRow) {}

  // Where the warp's rows see all keys.
  __device__ void load(States& states, device::SharedAddress tile) const {
    const device::SharedAddress from = tile + own_ + lane_key() % kSpan / kRun * 8;
    device::static_for<2>([&](auto half) {
      constexpr int kOffset = half * 8 * Ring::kStatesOfRow;
      if constexpr (kRuns == 1) {
        states[0][half] = state(device::load_shared_64<kOffset>(from));
      } else {
        const uint4 x = device::load_shared_128<kOffset>(from);
        states[0][half] = state({x.x, x.y});
        states[1][half] = state({x.z, x.w});
      }
    });
  }

  // Where the last of them sees `newest`, relative to the warpgroup's keys.
  __device__ void load(States& states, device::SharedAddress tile, int newest) const {
    const int first = lane_key() % kSpan, newest_of_span = newest - (lane_key() - first);
    int taken = 0;
    if (newest_of_span >= 0) {
      with_visible_width<kSpan / 8>(newest_of_span, 1, [&](auto tiles) { taken = 8 * tiles; });
    }
    const int length = max(taken / kRunsOfSpan, 1);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int oldest = (first + run * kRun) / length, end = (first + (run + 1) * kRun) / length;
      device::static_for<2>([&](auto half) {
        constexpr int kOffset = half * 8 * Ring::kStatesOfRow;
        const RunState stick = at<kOffset>(tile, end - 1), sum = at<kOffset>(tile, oldest);
        states[run][half] = taken == 0 ? RunState{0.0f, 0.0f} : RunState{stick.rem, sum.older};  // or there are none
      });
    }
  }

 private:
  __device__ static int lane_key() { return static_cast<int>(recomputed_lane()) % device::kQuad * kKeys; }
  __device__ static RunState state(const uint2& x) { return {__uint_as_float(x.x), __uint_as_float(x.y)}; }

  template <int kOffset>
  __device__ RunState at(device::SharedAddress tile, int run) const {
    run = min(run, kRunsOfSpan - 1);
    if constexpr (kRuns == 1) return state(device::load_shared_64<kOffset>(tile + own_ + run * 8));
    const uint4 x = device::load_shared_128<kOffset>(tile + own_ + run / 2 * 16);  // or lanes would meet in banks
    return state(run % 2 == 0 ? uint2{x.x, x.y} : uint2{x.z, x.w});
  }

  const std::uint32_t own_;
};

template <typename Op, int kDim>
class HopperBackwardDkv {
  using T = typename Storage<Op>::Type;
  static constexpr int kConsumers = device::kMultiplyingWarpgroups;
  static constexpr int kSpan = BackwardDqShape<Op, kDim>::kKeys;
  using Ring = QueryRing<kDim, kSpan, kDim <= 64 ? 4 : 3, kConsumers>;
  using Boxes = KvBoxes<kDim, kWarpgroupKeys, 1>;
  using Exchange = WarpgroupExchange<Op>;
  using RunStates = LaneRunStates<Ring>;

  struct Shared {
    Ring ring;
    alignas(1024) unsigned char keys[kConsumers][Boxes::kStageBytes];
    alignas(1024) unsigned char exchange[kConsumers][Exchange::kBytes];
  };
  static constexpr int kScratchBytes = 16 * staging_row_bytes<T>(kDim / 8);  // of a warp
  static_assert(4 * kScratchBytes <= Exchange::kBytes, "results leave through the exchange boxes");

 public:
  static constexpr int kRows = Ring::kKeys;  // keys
  static constexpr int kThreads = device::kRolesThreads;
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kLoadingRegisters = 56;  // fewer than elsewhere, so that those that multiply have 224

  static __device__ void run(const BackwardLaunch& launch) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    const KvBlockInfo block(launch, kRows, blockIdx.x);
    if (!block.any) return;
    if (threadIdx.x == 0) memory.ring.init();
    device::take_roles<kConsumers, kLoadingRegisters>(
        [&] { QueryProducer<T, Ring>(memory.ring, launch, block).run(); },
        [&](int warpgroup) { multiply(launch, block, memory, warpgroup); });
  }

 private:
  // A warpgroup's keys, interleaved: K, then V.
  static __device__ void load_keys(const BackwardLaunch& launch, const KvBlockInfo& block, device::SharedAddress boxes,
                                   int first_key, int thread) {
    constexpr int kChunks = kDim / 8, kKeysAtOnce = device::kWarpgroup / kChunks;
    const StickAttentionProblem& p = launch.params.problem;
    const int chunk = thread % kChunks, keys = chunk * 8 < p.head_dim ? block.s.keys - first_key : 0;
    const auto load = [&](device::SharedAddress to, const void* tensor, const StickKeyStrides& strides, bool aligned) {
      const T* const from = kv_pointer<const T>(tensor, strides, block.s, block.head, first_key) + chunk * 8;
#pragma unroll
      for (int key = thread / kChunks; key < kWarpgroupKeys; key += kKeysAtOnce) {
        copy_chunk<T, kWholeChunks>(to + chunk / 8 * Boxes::kBoxBytes +
                                        device::swizzled_offset<device::kBoxRowBytes>(Boxes::row_of(key), chunk % 8),
                                    from + key * strides.token, key < keys ? 16 : 0, aligned);
      }
    };
    load(boxes, p.k, p.k_strides, launch.k_aligned);
    load(boxes + Boxes::kTileBytes, p.v, p.v_strides, launch.v_aligned);
  }

  static __device__ void multiply(const BackwardLaunch& launch, const KvBlockInfo& block, Shared& shared,
                                  int consumer) {
    const StickAttentionProblem& p = launch.params.problem;
    const Sequence& s = block.s;
    const int thread = threadIdx.x % device::kWarpgroup, row_in_tile = thread / 32 * 16;
    const int first_key = block.first_key + consumer * kWarpgroupKeys;
    const device::SharedAddress keys = device::shared_address(shared.keys[consumer]);
    const device::SharedAddress boxes = device::shared_address(shared.exchange[consumer]);
    load_keys(launch, block, keys, first_key, thread);

    const int barrier = 1 + consumer;  // of this warpgroup
    const auto synchronize = [&] { cutlass::arch::NamedBarrier::sync(device::kWarpgroup, barrier); };
    const Exchange exchange(boxes, row_in_tile);
    const RunStates run_states(consumer, row_in_tile);
    const SpanMask<kWarpgroupKeys> mask(p, s, first_key);
    const Beta beta{-launch.factor};
    float grad_k[kDim / 8][4] = {}, grad_v[kDim / 8][4] = {};
    device::cp_async_wait_all();
    cutlass::arch::fence_view_async_shared();
    synchronize();

    QueryConsumer<Ring> queries(shared.ring, consumer);
    while (queries.next()) {
      const int warp_row = queries.first_row() + row_in_tile;
      float scores[8][4] = {}, grads[8][4] = {};  // not read, but else they would be where the last tile's were
      device::order_group(
          [&] {
            device::multiply_abt<Op, kDim>(scores, queries.q(), keys);
            device::multiply_abt<Op, kDim>(grads, queries.grad_o(), keys + Boxes::kTileBytes);
          },
          scores, grads);
      cute::warpgroup_wait<0>();
      device::fence_acc(scores);
      device::fence_acc(grads);
      queries.free_last();
      synchronize();  // all warps' last products have read the exchange boxes
      mask.apply(warp_row, mask.whole(), [&](auto masked, const Visible<2>& visible) {
        typename RunStates::States states;
        if constexpr (masked) {
          run_states.load(states, queries.states(), s.newest_key(p, min(warp_row + 15, s.rows - 1)) - first_key);
        } else {
          run_states.load(states, queries.states());
        }
        device::static_for<RunStates::kRuns>([&](auto run) {
          constexpr int kTiles = 8 / RunStates::kRuns;
          using Run = float[kTiles][4];
          const Visible<2> visible_of_run = {visible.of_row[0] >> 2 * kTiles * run,
                                             visible.of_row[1] >> 2 * kTiles * run};
          LaneRuns<Op, kTiles> weights, grad_scores;
          stick_break_runs<Op, masked>(reinterpret_cast<Run&>(scores[kTiles * run]),
                                       reinterpret_cast<Run&>(grads[kTiles * run]), weights, grad_scores, beta,
                                       visible_of_run, states[run]);
          exchange.store(std::integral_constant<int, kTiles * run>{}, weights, grad_scores);
        });
      });
      cutlass::arch::fence_view_async_shared();
      synchronize();
      device::order_group(
          [&] {
            device::multiply_atb<Op, kStickTileRows>(grad_v, exchange.weights(), queries.grad_o());
            device::multiply_atb<Op, kStickTileRows>(grad_k, exchange.grad_scores(), queries.q());
          },
          grad_v, grad_k);
    }
    cute::warpgroup_wait<0>();
    device::fence_acc(grad_v);
    device::fence_acc(grad_k);
    synchronize();  // the exchange boxes' place takes the results

    scale_key_grads<Op>(launch, grad_k, grad_v);
    store_key_grads<Op, kSpan, kRunsOfSpan>(launch, KvBlockInfo::recompute(launch, kRows),
                                            consumer * kWarpgroupKeys + row_in_tile, 0, grad_k, grad_v,
                                            boxes + thread / 32 * kScratchBytes);
  }
};

}  // namespace mfx::stick
