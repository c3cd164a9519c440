// stick_attention forward on sm_90a for head dims above 256 where K is V. A cluster of two blocks owns 64 query rows
// and walks tiles of 64 keys; each block has half of the columns of Q and of the tiles, and in each of its two
// multiplying warpgroups a quarter of those of O:
//
//   S_b [64, keys]  = Q_b K_b^T            wgmma over the block's 512 columns, each warpgroup half of the keys
//   S               = S_0 + S_1            through distributed shared memory (score_parts.cuh)
//   weights         = scan(S)              by all four warpgroups alike, in registers
//   O_w [64, 256]  += weights V_w          wgmma, the weights from registers
//
// All four see the same bits of S, so that they end at the same tile without a word.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "stick_attention/forward.cuh"
#include "stick_attention/hopper/kv_ring.cuh"
#include "stick_attention/hopper/row_boxes.cuh"
#include "stick_attention/hopper/score_parts.cuh"
#include "stick_attention/wide.cuh"
#include "tile/warpgroup_product.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::stick {

template <typename Op>
class HopperForwardWide {
  using T = typename Storage<Op>::Type;
  static constexpr int kDim = 1024, kColumns = kDim / kClusterBlocks, kConsumers = device::kMultiplyingWarpgroups;
  static constexpr int kWindow = kColumns / kConsumers;  // columns of O of a warpgroup
  using Boxes = SharedKvBoxes<kColumns, 64, 2>;
  using Rows = RowBoxes<T, kWindow>;
  using Barriers = KvBarriers<Boxes::kStages, kConsumers>;
  static constexpr int kKeys = Boxes::kKeys, kWindowBytes = kWindow / 64 * Boxes::kBoxBytes;
  static constexpr int kWarps = device::kWarpgroup / device::kWarp;
  static_assert(kConsumers == ScoreParts::kWarpgroups && kWarps == ScoreParts::kWarps &&
                kKeys / 8 == ScoreParts::kTiles);

  struct Shared {
    alignas(1024) unsigned char stages[Boxes::kStages * Boxes::kStageBytes];
    alignas(1024) unsigned char queries[kConsumers][Rows::kBytes];
    ScoreParts parts;
    Barriers ring;
  };

 public:
  static constexpr int kRows = kStickTileRows;
  static constexpr int kThreads = device::kRolesThreads;
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ void run(const ForwardLaunch& launch) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    const BlockInfo tile(launch.params.problem, kRows, blockIdx.x);
    if (tile.first_row >= tile.s.rows) return;
    if (threadIdx.x == 0) {
      memory.ring.init();
      memory.parts.init();
    }
    __syncwarp();
    cute::cluster_arrive();
    cute::cluster_wait();
    device::take_roles([&] { load(launch, tile, memory); },
                       [&](int warpgroup) { multiply(launch, tile, memory, warpgroup); });
    __syncwarp();
    cute::cluster_arrive();  // a block that ends takes its shared memory with it
    cute::cluster_wait();
  }

 private:
  static __device__ int first_column() { return static_cast<int>(blockIdx.y) * kColumns; }

  static __device__ void load(const ForwardLaunch& launch, const BlockInfo& tile, Shared& shared) {
    const int newest = newest_tile<kKeys>(launch.params.problem, tile.s, tile.first_row, kRows);
    const unsigned walking = newest >= 0 ? (1u << kConsumers) - 1 : 0;
    KvProducer<T, Boxes, kConsumers, ForwardLaunch> producer(shared.ring, launch, tile, walking, first_column());
    producer.run(device::shared_address(shared.stages), newest, 0);
  }

  static __device__ void multiply(const ForwardLaunch& launch, const BlockInfo& tile, Shared& shared, int consumer) {
    const StickAttentionForwardParams& params = launch.params;
    const StickAttentionProblem& p = params.problem;
    const Sequence& s = tile.s;
    const int thread = threadIdx.x % device::kWarpgroup, row_in_tile = thread / 32 * 16;
    const int window = first_column() + consumer * kWindow;
    const int barrier = 1 + consumer, barrier_of_all = 1 + kConsumers;
    constexpr int kAll = kConsumers * device::kWarpgroup;

    const device::SharedAddress queries = device::shared_address(shared.queries);
    Rows::load(queries + consumer * Rows::kBytes, p, tile, p.q, p.q_strides, launch.q_aligned, thread, window);
    const int warp_row = tile.first_row + row_in_tile;
    float rem[2];
    begin_sticks(rem, s, warp_row);
    Mask<kKeys> mask(p, s, warp_row);
    const ExpLogit exp_logit{launch.factor};
    const float epsilon = launch.epsilon;
    float o[kWindow / 8][4] = {};
    int key_tile = newest_tile<kKeys>(p, s, tile.first_row, kRows);
    mask.prefetch(key_tile);
    device::cp_async_wait_all();
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kAll, barrier_of_all);  // Q is there for both

    KvConsumer<Boxes::kStages, kConsumers> ring(shared.ring, consumer);
    ScoreExchange exchange(shared.parts, static_cast<int>(blockIdx.y), consumer);
    const device::SharedAddress stages = device::shared_address(shared.stages);
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
      float part[kKeys / kConsumers / 8][4] = {};
      device::order_group(
          [&] {
            device::multiply_abt<Op, kColumns, kKeys>(part, queries,
                                                      keys + consumer * (kKeys / kConsumers) * device::kBoxRowBytes);
          },
          part);
      cute::warpgroup_wait<1>();  // the sum of O, so that an older tile may come
      if (previous >= 0) ring.release(previous);
      cute::warpgroup_wait<0>();
      device::fence_acc(part);
      exchange.put(part);
      float scores[kKeys / 8][4];
      exchange.take(scores);
      device::OperandA<kKeys / 16> weights;
      mask.apply(key_tile, mask.whole(), [&](auto masked, const Visible<2>& visible) {
        stick_break<masked>(scores, exp_logit, visible, kWeightUnit<Op>, rem);
        weights = device::to_operand<Op>(scores);
      });
      device::order_ab<Op>(o, weights, keys + consumer * kWindowBytes);
      previous = stage;
    }
    cute::warpgroup_wait<0>();
    device::fence_acc(o);
    cutlass::arch::NamedBarrier::sync(kAll, barrier_of_all);  // Q's place takes O

    scale(o, 1.0f / kWeightUnit<Op>);
    // Computed anew: kept over the walk it would take registers.
    const BlockInfo same_tile = BlockInfo::recompute(p, kRows);
    std::uint32_t number = threadIdx.x;
    device::hide_from_optimizer(number);
    const int warp = static_cast<int>(number) / device::kWarp - kWarps, row = warp % kWarps * 16;
    const int column = first_column() + warp / kWarps * kWindow;
    const device::SharedAddress scratch = device::shared_address(shared.queries) + warp * (16 * Rows::kRowBytes);
    constexpr int kHalf = kWindow / 2;  // at a time, for what is rounded takes registers, too
    device::static_for<2>([&](auto half) {
      store_output<Op>(launch, same_tile, row, column + half * kHalf,
                       reinterpret_cast<float (&)[kHalf / 8][4]>(o[half * (kHalf / 8)]), scratch,
                       (key_tile + 1) * kKeys);
    });
    if (column == 0)
      store_sticks(params, same_tile, row, rem,
                   (key_tile + 1) * (kKeys / WideShape<Op>::kKeys));  // in backward's tiles
  }
};

}  // namespace mfx::stick
