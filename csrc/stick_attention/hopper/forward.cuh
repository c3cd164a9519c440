// stick_attention forward on sm_90a: forward.cuh with the products of a warpgroup. A block owns 64 query rows for
// each of two warpgroups (up to a head dim of 64: three) that walk the same tiles of keys, and another warpgroup loads
// these (kv_ring.cuh):
//
//   S [64, keys]   = Q K_tile^T                  wgmma, both from shared memory
//   weights        = scan(S) in the registers    as on sm_80: the accumulators are those of mma, repeated
//   O [64, D]     += weights V_tile              wgmma, the weights from registers
//
// While one warpgroup scans another multiplies. The sum of O is under way until the next scores are there; then the
// stage of its V is free. Each warpgroup exits early by itself, as a block of sm_80 does.
#pragma once

#include "stick_attention/forward.cuh"
#include "stick_attention/hopper/kv_ring.cuh"
#include "stick_attention/hopper/row_boxes.cuh"
#include "tile/warpgroup_product.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::stick {

template <typename Op, int kDim>
class HopperForward {
  using T = typename Storage<Op>::Type;
  using Boxes = KvBoxes<kDim, 64, 4>;
  using Rows = RowBoxes<T, kDim>;
  static constexpr int kConsumers = RowWarpgroups<kDim>::kCount, kKeys = Boxes::kKeys;
  using Barriers = KvBarriers<Boxes::kStages, kConsumers>;

  struct Shared {
    alignas(1024) unsigned char stages[Boxes::kStages * Boxes::kStageBytes];
    alignas(1024) unsigned char queries[kConsumers][Rows::kBytes];
    Barriers ring;
  };

 public:
  static constexpr int kRows = kConsumers * kStickTileRows;
  static constexpr int kThreads = RowWarpgroups<kDim>::kThreads;
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ void run(const ForwardLaunch& launch) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    BlockInfo tile(launch.params.problem, kRows, blockIdx.x);
    if (tile.first_row >= tile.s.rows) return;
    if (threadIdx.x == 0) memory.ring.init();
    RowWarpgroups<kDim>::take_roles([&] { load(launch, tile, memory); },
                                    [&](int warpgroup) { multiply(launch, tile, memory, warpgroup); });
  }

 private:
  static __device__ void load(const ForwardLaunch& launch, const BlockInfo& tile, Shared& shared) {
    const StickAttentionProblem& p = launch.params.problem;
    unsigned walking = 0;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      const int first_row = tile.first_row + i * kStickTileRows;
      const bool any = first_row < tile.s.rows && newest_tile<kKeys>(p, tile.s, first_row, kStickTileRows) >= 0;
      walking |= unsigned{any} << i;
    }
    KvProducer<T, Boxes, kConsumers, ForwardLaunch> producer(shared.ring, launch, tile, walking);
    producer.run(device::shared_address(shared.stages), newest_tile<kKeys>(p, tile.s, tile.first_row, kRows), 0);
  }

  static __device__ void multiply(const ForwardLaunch& launch, BlockInfo& tile, Shared& shared, int consumer) {
    const StickAttentionForwardParams& params = launch.params;
    const StickAttentionProblem& p = params.problem;
    const Sequence& s = tile.s;
    const int newest_of_block = newest_tile<kKeys>(p, s, tile.first_row, kRows);
    tile.first_row += consumer * kStickTileRows;
    if (tile.first_row >= s.rows) return;

    const int thread = threadIdx.x % device::kWarpgroup, row_in_tile = thread / 32 * 16;
    const device::SharedAddress queries = device::shared_address(shared.queries[consumer]);
    Rows::load(queries, p, tile, p.q, p.q_strides, launch.q_aligned, thread);

    const int warp_row = tile.first_row + row_in_tile;
    float rem[2];
    begin_sticks(rem, s, warp_row);
    Mask<kKeys> mask(p, s, warp_row);
    const ExpLogit exp_logit{launch.factor};
    const float epsilon = launch.epsilon;
    float o[kDim / 8][4] = {};

    const int barrier = 1 + consumer;  // of this warpgroup
    int key_tile = newest_tile<kKeys>(p, s, tile.first_row, kStickTileRows);
    mask.prefetch(key_tile);
    device::cp_async_wait_all();
    cutlass::arch::fence_view_async_shared();  // wgmma reads them after the first tile's barrier

    KvConsumer<Boxes::kStages, kConsumers> ring(shared.ring, consumer);
    const device::SharedAddress stages = device::shared_address(shared.stages);
    // The block's newest tiles may be too new for all rows of a warpgroup.
    for (int newer = key_tile < 0 ? key_tile : newest_of_block; newer > key_tile; --newer) ring.skip();
    int previous = -1;
    for (; key_tile >= 0; --key_tile) {
      const int stage = ring.wait();
      if (device::barrier_all_at_most(rem[0], rem[1], epsilon, barrier, device::kWarpgroup)) {
        cute::warpgroup_wait<0>();
        if (previous >= 0) ring.release(previous);
        ring.finish(stage);
        break;
      }
      mask.take(key_tile);
      const device::SharedAddress keys = stages + stage * Boxes::kStageBytes;
      float scores[kKeys / 8][4] = {};  // not read, but without it they would be where the last weights were
      device::order_abt<Op, kDim>(scores, queries, keys);
      cute::warpgroup_wait<0>();
      device::fence_acc(scores);
      if (previous >= 0) ring.release(previous);
      // Rounded within each of the scans, or what these leave would be moved to one place.
      device::OperandA<kKeys / 16> weights;
      mask.apply(key_tile, mask.whole(), [&](auto masked, const Visible<2>& visible) {
        stick_break<masked>(scores, exp_logit, visible, kWeightUnit<Op>, rem);
        weights = device::to_operand<Op>(scores);
      });
      device::order_ab<Op>(o, weights, keys + (p.k_is_v ? 0 : Boxes::kTileBytes));
      previous = stage;
    }
    cute::warpgroup_wait<0>();
    device::fence_acc(o);
    cutlass::arch::NamedBarrier::sync(device::kWarpgroup, barrier);  // Q's place takes O

    scale(o, 1.0f / kWeightUnit<Op>);
    store_output<Op>(launch, tile, row_in_tile, 0, o, queries + row_in_tile * Rows::kRowBytes, (key_tile + 1) * kKeys);
    store_sticks(params, tile, row_in_tile, rem, key_tile + 1);
  }
};

}  // namespace mfx::stick
