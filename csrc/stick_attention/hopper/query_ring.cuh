// The tiles of Q and dO that a block of keys walks on sm_90a, oldest first: what query_pipeline.cuh is to sm_80. A
// warpgroup finds and loads them, by cp.async, and with a tile the run states of its rows. Each multiplying warpgroup
// owns kWarpgroupKeys of the block's keys, goes by all tiles and takes those that see its keys and were visited.
#pragma once

#include <limits>

#include "stick_attention/backward.cuh"
#include "tile/slice_ring.cuh"
#include "tile/warpgroup_product.cuh"

namespace mfx::stick {

inline constexpr int kWarpgroupKeys = 64;

// In shared memory. kSpan: keys that have kRunsOfSpan states of a row.
template <int kDim, int kSpan_, int kStages_, int kConsumers_>
struct QueryRing {
  static constexpr int kStages = kStages_, kConsumers = kConsumers_, kSpan = kSpan_;
  static constexpr int kRows = kStickTileRows, kKeys = kConsumers * kWarpgroupKeys;
  static constexpr int kBoxes = kDim / 64, kBoxBytes = kRows * device::kBoxRowBytes, kTileBytes = kBoxes * kBoxBytes;
  static constexpr int kStatesOfRow = kRunsOfSpan * static_cast<int>(sizeof(RunState));
  // From span to span: lanes that read the states of two of them meet no bank twice.
  static constexpr int kStatesOfSpan = kRows * kStatesOfRow + (kSpan < kWarpgroupKeys ? 64 : 0);
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

  // Boxes of 64 columns of Q, then of dO.
  alignas(1024) unsigned char tiles[kStages][2 * kTileBytes];
  alignas(16) unsigned char states[kStages][kKeys / kSpan * kStatesOfSpan];
  std::uint64_t full[kStages], empty[kStages];
  struct alignas(8) Tile {
    int first_row;         // -1: there are no more
    std::uint32_t wanted;  // by which warpgroups, a bit each
  } tile[kStages];

  // By one thread, before a barrier of the block. Warps arrive; a stage is free when all consumers' have.
  __device__ void init() {
    constexpr int kWarps = device::kWarpgroup / device::kWarp;
    for (int stage = 0; stage < kStages; ++stage) {
      Barrier::init(&full[stage], kWarps);
      Barrier::init(&empty[stage], kConsumers * kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
};

// The side that loads; all threads of warpgroup 0.
template <typename T, typename Ring>
class QueryProducer {
  using Loader = TileLoader<T, device::kBoxRowBytes, device::kWarpgroup>;
  // A consumer holds two stages, one of them until it has the products of the next.
  using Producer = device::RingProducer<Ring, Ring::kStages - 2>;
  static constexpr int kRows = Ring::kRows, kConsumers = Ring::kConsumers;
  static constexpr int kStateChunks = Ring::kStatesOfRow / 16;  // of a row
  static_assert(kRows * kStateChunks == device::kWarpgroup, "a thread copies a chunk of each span");

 public:
  __device__ QueryProducer(Ring& ring, const BackwardLaunch& launch, const KvBlockInfo& block)
      : ring_(ring),
        launch_(launch),
        block_(block),
        q_(lane(launch.params.problem.q, launch.params.problem.q_strides, launch.q_aligned)),
        grad_o_(lane(launch.params.grad_o, launch.params.grad_o_strides, launch.grad_o_aligned)),
        states_(launch.run_states +
                ((block.first_key - launch.chunk_begin) / Ring::kSpan * states_of_span() +
                 workspace_row(launch, block.s, block.head, state_row())) *
                    kRunsOfSpan +
                threadIdx.x % kStateChunks * (kRunsOfSpan / kStateChunks)) {}

  __device__ void run() {
    const Sequence& s = block_.s;
    const int end = (s.rows + kRows - 1) / kRows;
    int first[kConsumers];  // tile that sees a warpgroup's keys
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      first[i] = key(i) < s.keys ? max(s.first_row(launch_.params.problem, key(i)), 0) / kRows : end;
    }
    Producer producer(ring_);
    for (int chunk = first[0]; chunk < end; chunk += device::kWarp) {  // each warp finds as many at a time
      const int own = chunk + device::lane_id();
      constexpr int kNothing = std::numeric_limits<int>::max();
      const int oldest = own < end ? first_visited_key(launch_, s, block_.head, own * kRows) : kNothing;
      std::uint32_t wanted[kConsumers], any = 0;
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        wanted[i] = __ballot_sync(device::kAllLanes, own >= first[i] && oldest <= key(i));
        any |= wanted[i];
      }
      for (; any != 0; any &= any - 1) {
        const int bit = __ffs(static_cast<int>(any)) - 1;
        std::uint32_t by = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) by |= (wanted[i] >> bit & 1) << i;
        const int stage = begin(producer, (chunk + bit) * kRows, by);
        load(stage, chunk + bit, by);
        producer.commit();
      }
    }
    begin(producer, -1, 0);
    producer.commit();
    producer.drain();
  }

 private:
  __device__ int key(int consumer) const { return block_.first_key + consumer * kWarpgroupKeys; }
  __device__ std::int64_t states_of_span() const { return launch_.params.problem.heads * launch_.rows; }
  __device__ static int state_row() { return static_cast<int>(threadIdx.x) / kStateChunks; }
  __device__ QRows<const T> rows(const void* tensor, const StickQueryStrides& strides, int row, int column) const {
    return {tensor, strides, launch_.params.problem, block_.s, block_.head, row, column};
  }
  __device__ typename Loader::Lane lane(const void* tensor, const StickQueryStrides& strides, bool aligned) const {
    return Loader(launch_.params.problem.head_dim).lane(rows(tensor, strides, 0, 0), aligned);
  }

  __device__ int begin(Producer& producer, int first_row, std::uint32_t wanted) {
    const int stage = producer.acquire();
    if (threadIdx.x == 0) ring_.tile[stage] = {first_row, wanted};
    return stage;
  }

  __device__ void load(int stage, int tile, std::uint32_t wanted) const {
    const StickAttentionProblem& p = launch_.params.problem;
    const device::SharedAddress to = device::shared_address(ring_.tiles[stage]);
    load_tile(to, tile, q_, p.q, p.q_strides, launch_.q_aligned);
    load_tile(to + Ring::kTileBytes, tile, grad_o_, launch_.params.grad_o, launch_.params.grad_o_strides,
              launch_.grad_o_aligned);
    // Zeros for rows that are not there: they see nothing, and need finite numbers. Keys that no warpgroup has may have
    // no states.
    const RunState* from = states_ + std::int64_t{tile} * (kRows * kRunsOfSpan);
    const bool there = tile * kRows + state_row() < block_.s.rows;
    const device::SharedAddress states = device::shared_address(ring_.states[stage]) + threadIdx.x * 16;
#pragma unroll
    for (int span = 0; span < Ring::kKeys / Ring::kSpan; ++span) {
      const bool used = there && (wanted >> span * Ring::kSpan / kWarpgroupKeys & 1) != 0;
      device::cp_async<16>(states + span * Ring::kStatesOfSpan, from, used ? 16 : 0);
      from += states_of_span() * kRunsOfSpan;
    }
  }

  __device__ void load_tile(device::SharedAddress to, int tile, const typename Loader::Lane& lane, const void* tensor,
                            const StickQueryStrides& strides, bool aligned) const {
    const bool whole = lane.step != 0 && (tile + 1) * kRows <= block_.s.rows;
    device::static_for<Ring::kBoxes>([&](auto box) {
      constexpr int kColumn = box * 64;
      const Loader loader(launch_.params.problem.head_dim - kColumn);
      if (whole) {
        loader.template whole_rows<kRows, box * Ring::kBoxBytes>(
            to, {lane.own + kColumn * static_cast<int>(sizeof(T)), lane.step}, tile);
      } else {
        loader.template rows<kRows>(to + box * Ring::kBoxBytes, rows(tensor, strides, tile * kRows, kColumn), aligned);
      }
    });
  }

  Ring& ring_;
  const BackwardLaunch& launch_;
  const KvBlockInfo& block_;
  const typename Loader::Lane q_, grad_o_;  // this thread's first chunk
  const RunState* const states_;            // and that of the states
};

// The side of one warpgroup that multiplies.
template <typename Ring>
class QueryConsumer : device::StageConsumer<Ring::kStages> {
  using Stages = device::StageConsumer<Ring::kStages>;

 public:
  __device__ QueryConsumer(Ring& ring, int consumer)
      : Stages(ring.full, ring.empty), ring_(ring), consumer_(consumer) {}

  // Waits for the next tile that this warpgroup takes, and says whether there is one. The stage of the last one remains
  // its own until free_last(), or until a tile comes by that others take: not to hold it up, the products with the last
  // one are waited for then.
  __device__ bool next() {
    last_ = stage_;
    while (true) {
      const int stage = Stages::wait();
      const uint2 tile = device::load_shared_64(device::shared_address(&ring_.tile[stage]));
      first_row_ = static_cast<int>(tile.x);
      stage_ = stage;
      if (first_row_ < 0) return false;
      if ((tile.y >> consumer_ & 1) != 0) return true;
      cute::warpgroup_wait<0>();
      free_last();
      __syncwarp();
      Stages::release(stage);
    }
  }
  // Once the products with the last tile are finished.
  __device__ void free_last() {
    if (last_ >= 0) Stages::release(last_);
    last_ = -1;
  }
  __device__ int first_row() const { return first_row_; }
  __device__ device::SharedAddress q() const { return device::shared_address(ring_.tiles[0]) + stage_ * kStageBytes; }
  __device__ device::SharedAddress grad_o() const { return q() + Ring::kTileBytes; }
  __device__ device::SharedAddress states() const {
    return device::shared_address(ring_.states[0]) + stage_ * static_cast<int>(sizeof(ring_.states[0]));
  }

 private:
  static constexpr int kStageBytes = 2 * Ring::kTileBytes;

  Ring& ring_;
  const int consumer_;
  int stage_ = -1, last_ = -1, first_row_ = 0;
};

}  // namespace mfx::stick
