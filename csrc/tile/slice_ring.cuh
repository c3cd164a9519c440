// The ring of slices between one warpgroup that loads and others that multiply, for sm_90a: what the Pipeline of
// block_gemm.cuh is to sm_80. Each stage has two mbarriers: `full` completes when its slice is there, `empty` when it
// has been multiplied.
//
// Slices are numbered by the order in which they are loaded. Of several multiplying warpgroups each takes slices of its
// own and skips the others', in turns: an mbarrier tells a phase from the one before it, no more, so that a slice may
// be waited for when all older ones have come. It also leaves the tensor cores to one at a time.
#pragma once

#include <cutlass/arch/barrier.h>

#include "ptx/cp_async.cuh"
#include "ptx/warp.cuh"

namespace mfx::device {

inline constexpr int kWarpgroup = 128;

template <int kStages>
class RingPosition {
 public:
  __device__ int stage() const { return stage_; }
  __device__ unsigned parity() const { return parity_; }
  __device__ void advance(int slices = 1) {
    stage_ += slices;
    parity_ ^= stage_ / kStages & 1;
    stage_ %= kStages;
  }
  __device__ void next() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  unsigned parity_ = 0;
};

// In shared memory.
template <int kStages_, int kConsumers>
struct RingBarriers {
  static constexpr int kStages = kStages_;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  std::uint64_t full[kStages], empty[kStages];
  std::uint64_t turn[kConsumers];  // completes when the consumer may wait for its next slices

  // By one thread, before a barrier of the block. Arrivals at `full` come from the loading warps, and from the thread
  // that announces bytes of bulk copies where there are any; at `empty` and `turn` from the warps that multiplied.
  __device__ void init(bool bulk_copies) {
    for (int i = 0; i < kStages; ++i) {
      Barrier::init(&full[i], kWarpgroup / kWarp + (bulk_copies ? 1 : 0));
      Barrier::init(&empty[i], kWarpgroup / kWarp);
    }
    for (std::uint64_t& consumer : turn) Barrier::init(&consumer, kWarpgroup / kWarp);
    cutlass::arch::fence_barrier_init();
  }
};

// The side that loads: by cp.async, of which every thread brings its part, and by bulk copies. wgmma reads through the
// async proxy, so that each thread fences its own finished copies before the slice is published; to let several slices
// be under way, a slice is published kLag slices after its copies were ordered. By then kLag further stages must be
// free, whatever those that multiply still hold.
template <typename Barriers, int kLag = 2>
class RingProducer {
  static constexpr int kStages = Barriers::kStages;
  static_assert(kLag < kStages, "a slice that is waited for must have been published");

 public:
  __device__ explicit RingProducer(Barriers& barriers) : barriers_(barriers) {}

  // Waits for the next slice's stage to be free.
  __device__ int acquire() {
    return acquire([&](int stage, unsigned parity) { Barriers::Barrier::wait(&barriers_.empty[stage], parity); });
  }
  // The same where wait_free(stage, parity) does the waiting.
  template <typename WaitFree>
  __device__ int acquire(WaitFree&& wait_free) {
    wait_free(position_.stage(), position_.parity() ^ 1);
    return position_.stage();
  }
  // What bulk copies into the acquired stage arrive at, once one thread has announced their bytes.
  __device__ std::uint64_t* announce(int bytes) {
    std::uint64_t* const full = &barriers_.full[position_.stage()];
    Barriers::Barrier::arrive_and_expect_tx(full, bytes);
    return full;
  }
  // After this thread's copies into the acquired stage have been ordered.
  __device__ void commit() {
    cp_async_commit();
    position_.next();
    if (++pending_ > kLag) {
      cp_async_wait<kLag>();
      publish();
    }
  }
  __device__ void drain() {
    cp_async_wait<0>();
    while (pending_ > 0) publish();
  }

 private:
  __device__ void publish() {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane_id() == 0) Barriers::Barrier::arrive(&barriers_.full[published_.stage()]);
    published_.next();
    --pending_;
  }

  Barriers& barriers_;
  RingPosition<kStages> position_, published_;
  int pending_ = 0;
};

// The side of one warpgroup that multiplies: what it waits for, and the stages that it frees.
template <int kStages>
class StageConsumer {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  __device__ StageConsumer(std::uint64_t (&full)[kStages], std::uint64_t (&empty)[kStages])
      : full_(full), empty_(empty) {}

  // Waits for the next slice.
  __device__ int wait() {
    Barrier::wait(&full_[position_.stage()], position_.parity());
    const int stage = position_.stage();
    position_.next();
    return stage;
  }
  // Frees a stage of which this warp's products are finished.
  __device__ void release(int stage) {
    if (lane_id() == 0) Barrier::arrive(&empty_[stage]);
  }

 protected:
  RingPosition<kStages> position_;

 private:
  std::uint64_t (&full_)[kStages];
  std::uint64_t (&empty_)[kStages];
};

// The same where several take turns.
template <int kStages, int kConsumers>
class RingConsumer : public StageConsumer<kStages> {
  using Barriers = RingBarriers<kStages, kConsumers>;

 public:
  // The first turn is consumer 0's.
  __device__ RingConsumer(Barriers& barriers, int consumer)
      : StageConsumer<kStages>(barriers.full, barriers.empty),
        barriers_(barriers),
        consumer_(consumer),
        turn_parity_(consumer == 0 ? 1 : 0) {}

  // Until the consumer before this one has all its slices, and after the last of this one's.
  __device__ void take_turn() {
    Barriers::Barrier::wait(&barriers_.turn[consumer_], turn_parity_);
    turn_parity_ ^= 1;
  }
  __device__ void pass_turn() {
    if (lane_id() == 0) Barriers::Barrier::arrive(&barriers_.turn[(consumer_ + 1) % kConsumers]);
  }

  // Slices that other warpgroups take.
  __device__ void skip(int slices) { this->position_.advance(slices); }

 private:
  Barriers& barriers_;
  const int consumer_;
  unsigned turn_parity_;
};

}  // namespace mfx::device
