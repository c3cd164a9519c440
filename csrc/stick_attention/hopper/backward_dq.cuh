// stick_attention backward on sm_90a, the dQ kernel: backward_dq.cuh with the products of a warpgroup, in blocks as
// those of hopper/forward.cuh, of the same rows and with a ring of tiles of keys. Per tile and warpgroup of 64 rows
//
//   S = Q K_tile^T,  dP = dO V_tile^T            wgmma, all from shared memory
//   (weights, dS) = scan(S, dP)                  in the registers, as on sm_80
//   dQ [64, D] += dS K_tile                      wgmma, dS from registers
//
// The sum of dQ is under way until the next scores are there; then the stage is free.
//
// Run states are those of sm_80, which the dK/dV kernels read: of a span's runs of keys where the warp's rows see it
// whole, and of shorter ones on the diagonal. A lane scans 16 keys of a tile of 64, which are a run, two, or parts.
#pragma once

#include <limits>

#include "stick_attention/backward_dq.cuh"
#include "stick_attention/hopper/kv_ring.cuh"
#include "stick_attention/hopper/row_boxes.cuh"
#include "tile/warpgroup_product.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::stick {

// The run states of tiles of kKeys on their way to memory: those of a lane's kKeys / 4 keys of rows g and g + 8 from
// `row` on.
template <int kKeys, int kSpan>
class TileStatesOut {
  static constexpr int kRun = kKeys / device::kQuad, kSpans = kKeys / kSpan;

 public:
  // Runs of a lane where its rows see the tile whole, and the shortest parts of one, of 4 keys.
  static constexpr int kWholeRuns = kSpans, kParts = kRun / 4;

  __device__ TileStatesOut(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int row, int key_tile)
      : rows_(s.rows - row - device::lane_id() / 4),
        span_(launch.params.problem.heads * launch.rows * kRunsOfSpan),
        states_(launch.run_states + (key_tile * kSpans - launch.chunk_begin / kSpan) * span_ +
                workspace_row(launch, s, head, row + device::lane_id() / 4) * kRunsOfSpan) {}

  // A tile that the rows see.
  __device__ void whole(int half, const RunState (&of_runs)[kWholeRuns]) const {
    if (8 * half >= rows_) return;
    RunState* const to = of_span(first_key() / kSpan) + 8 * half * kRunsOfSpan + first_key() % kSpan / (kRun / kSpans);
#pragma unroll
    for (int i = 0; i < kWholeRuns; ++i) to[i] = of_runs[i];
  }
  __device__ void whole(int half, const RunState& of_run) const {
    const RunState one[1] = {of_run};
    whole(half, one);
  }
  // One of which they may see less: `mask` and `first_key` say how much of its spans.
  template <typename Mask>
  __device__ void part(int half, const Mask& mask, int first_key_of_tile, const RunState (&of_parts)[kParts]) const {
    if (8 * half >= rows_) return;
    const int span = first_key() / kSpan, keys = mask.template width_keys<kSpan>(first_key_of_tile + span * kSpan);
    const int run_keys = keys / kRunsOfSpan, run_bits = __ffs(run_keys) - 1;
    RunState* const to = of_span(span) + 8 * half * kRunsOfSpan;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int key = first_key() % kSpan + 4 * i;
      if (key >= keys) break;
      RunState* const run = to + (key >> run_bits);
      if ((key & run_keys - 1) == 0) run->older = of_parts[i].older;
      if ((key + 4 & run_keys - 1) == 0) run->rem = of_parts[i].rem;
    }
  }
  __device__ void next() { states_ -= kSpans * span_; }

 private:
  // Of this lane, in a tile.
  static __device__ int first_key() { return static_cast<int>(threadIdx.x % device::kQuad) * kRun; }
  __device__ RunState* of_span(int span) const { return states_ + span * span_; }

  const int rows_;
  const std::int64_t span_;  // from span to span
  RunState* states_;
};

template <typename Op, int kDim>
class HopperBackwardDq {
  using T = typename Storage<Op>::Type;
  using Boxes = KvBoxes<kDim, 64, 4>;
  using Rows = RowBoxes<T, kDim>;
  static constexpr int kConsumers = RowWarpgroups<kDim>::kCount, kKeys = Boxes::kKeys;
  using Barriers = KvBarriers<Boxes::kStages, kConsumers>;
  using States = TileStatesOut<kKeys, BackwardDqShape<Op, kDim>::kKeys>;

  struct Shared {
    alignas(1024) unsigned char stages[Boxes::kStages * Boxes::kStageBytes];
    alignas(1024) unsigned char queries[kConsumers][Rows::kBytes];
    alignas(1024) unsigned char grads[kConsumers][Rows::kBytes];
    Barriers ring;
  };

 public:
  static constexpr int kRows = kConsumers * kStickTileRows;
  static constexpr int kThreads = RowWarpgroups<kDim>::kThreads;
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ void run(const BackwardLaunch& launch) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    BlockInfo tile(launch.params.problem, kRows, blockIdx.x);
    if (tile.first_row >= tile.s.rows) return;
    if (threadIdx.x == 0) memory.ring.init();
    RowWarpgroups<kDim>::take_roles([&] { load(launch, tile, memory); },
                                    [&](int warpgroup) { multiply(launch, tile, memory, warpgroup); });
  }

 private:
  // The tiles that a warpgroup walks in the K/V chunk.
  struct Walk {
    int newest = -1, oldest = std::numeric_limits<int>::max();

    __device__ Walk(const BackwardLaunch& launch, BlockInfo tile, int consumer) {
      tile.first_row += consumer * kStickTileRows;
      if (tile.first_row >= tile.s.rows) return;
      const ChunkWalk keys(launch, tile, kStickTileRows);
      if (keys.begin >= keys.end) return;
      newest = keys.newest_tile(kKeys);
      oldest = keys.begin / kKeys;
    }
    __device__ bool any() const { return newest >= 0; }
  };

  static __device__ void load(const BackwardLaunch& launch, const BlockInfo& tile, Shared& shared) {
    unsigned walking = 0;
    int newest = -1, oldest = std::numeric_limits<int>::max();
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      const Walk walk(launch, tile, i);
      walking |= unsigned{walk.any()} << i;
      newest = max(newest, walk.newest);
      oldest = min(oldest, walk.oldest);
    }
    KvProducer<T, Boxes, kConsumers, BackwardLaunch> producer(shared.ring, launch, tile, walking);
    producer.run(device::shared_address(shared.stages), newest, oldest);
  }

  static __device__ void multiply(const BackwardLaunch& launch, BlockInfo& tile, Shared& shared, int consumer) {
    const StickAttentionBackwardParams& params = launch.params;
    const StickAttentionProblem& p = params.problem;
    const Sequence& s = tile.s;
    int newest_of_others = -1;  // of warpgroups with newer rows
    for (int i = consumer + 1; i < kConsumers; ++i) {
      newest_of_others = max(newest_of_others, Walk(launch, tile, i).newest);
    }
    tile.first_row += consumer * kStickTileRows;
    if (tile.first_row >= s.rows) return;
    const ChunkWalk keys(launch, tile, kStickTileRows);
    if (!keys.any) return;

    const int thread = threadIdx.x % device::kWarpgroup, row_in_tile = thread / 32 * 16;
    const int warp_row = tile.first_row + row_in_tile;
    const device::SharedAddress queries = device::shared_address(shared.queries[consumer]);
    const device::SharedAddress grads = device::shared_address(shared.grads[consumer]);
    Rows::load(queries, p, tile, p.q, p.q_strides, launch.q_aligned, thread);
    Rows::load(grads, p, tile, params.grad_o, params.grad_o_strides, launch.grad_o_aligned, thread);

    int key_tile = keys.newest_tile(kKeys);
    Mask<kKeys> mask(p, s, warp_row);
    mask.prefetch(key_tile);
    const float v_norm = v_norm_max(launch, tile, keys);
    device::cp_async_wait_all();
    cutlass::arch::fence_view_async_shared();
    const int barrier = 1 + consumer;                                // of this warpgroup
    cutlass::arch::NamedBarrier::sync(device::kWarpgroup, barrier);  // Q and dO are there
    float with_o[2] = {}, squares[2] = {};
    Rows::each(grads, [&](device::SharedAddress box, int column) {
      float with_o_box[2], squares_box[2];
      grad_products<T, device::kBoxRowBytes>(launch, s, tile.head, warp_row, column,
                                             box + row_in_tile * device::kBoxRowBytes, with_o_box, squares_box);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        with_o[half] += with_o_box[half];
        squares[half] += squares_box[half];
      }
    });
    BackwardRows<2> rows = begin_backward_rows(launch, tile, keys, warp_row, with_o, squares, v_norm);
    const Beta beta{-launch.factor};
    float grad_q[kDim / 8][4] = {};

    KvConsumer<Boxes::kStages, kConsumers> ring(shared.ring, consumer);
    const device::SharedAddress stages = device::shared_address(shared.stages);
    States states(launch, s, tile.head, warp_row, key_tile);
    // The block's newest tiles may be too new for all rows of a warpgroup.
    if (key_tile * kKeys >= keys.begin) {
      for (int newer = newest_of_others; newer > key_tile; --newer) ring.skip();
    }
    int previous = -1;
    for (; key_tile * kKeys >= keys.begin; --key_tile) {
      const int stage = ring.wait();
      mask.take(key_tile);
      const device::SharedAddress k = stages + stage * Boxes::kStageBytes;
      // Not read, but without it they would be where the last gradients were.
      float scores[kKeys / 8][4] = {}, grad_weights[kKeys / 8][4] = {};
      const auto order = [&] {
        device::multiply_abt<Op, kDim>(scores, queries, k);
        device::multiply_abt<Op, kDim>(grad_weights, grads, k + (p.k_is_v ? 0 : Boxes::kTileBytes));
      };
      device::order_group(order, scores, grad_weights);
      cute::warpgroup_wait<0>();
      device::fence_acc(scores);
      device::fence_acc(grad_weights);
      if (previous >= 0) ring.release(previous);
      // Rounded within each of the scans, or what these leave would be moved to one place.
      device::OperandA<kKeys / 16> grad_scores;
      mask.apply(key_tile, mask.whole(), [&](auto masked, const Visible<2>& visible) {
        constexpr int kParts = masked ? States::kParts : States::kWholeRuns;
        stick_break_backward<Op, masked, device::kQuad, kParts>(scores, grad_weights, beta, visible, rows,
                                                                [&](int half, const auto& left) {
                                                                  if constexpr (masked) {
                                                                    states.part(half, mask, key_tile * kKeys, left);
                                                                  } else {
                                                                    states.whole(half, left);
                                                                  }
                                                                });
        grad_scores = device::to_operand<Op>(grad_weights);
      });
      device::order_ab<Op>(grad_q, grad_scores, k);
      states.next();
      previous = stage;
    }
    cute::warpgroup_wait<0>();
    device::fence_acc(grad_q);
    if (previous >= 0) ring.finish(previous);
    cutlass::arch::NamedBarrier::sync(device::kWarpgroup, barrier);  // Q's place takes dQ

    // Not before the walk, or ptxas would define registers among its products, and serialise these.
    if (!keys.starts) add_sums(launch, tile, row_in_tile, 0, grad_q);
    finish_grad_q<Op>(launch, tile, keys, row_in_tile, rows, grad_q, queries + row_in_tile * Rows::kRowBytes);
  }
};

}  // namespace mfx::stick
