// The tiles of K and V that a block's warpgroups walk, from the newest to the oldest: what kv_pipeline.cuh is to sm_80.
// A warpgroup loads them, by cp.async, and every multiplying one takes them all, until its sticks are exhausted: then
// it says so, and the loading one waits for it no longer.
#pragma once

#include "stick_attention/hopper/kv_boxes.cuh"
#include "stick_attention/tile_loader.cuh"
#include "tile/slice_ring.cuh"

namespace mfx::stick {

// In shared memory. A stage is free when each walking warpgroup has said so.
template <int kStages_, int kWalkers>
struct KvBarriers {
  static constexpr int kStages = kStages_;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  std::uint64_t full[kStages], empty[kWalkers][kStages];
  bool last[kWalkers][kStages];  // the walk ended at the tile that the stage had

  // By one thread, before a barrier of the block. Warps arrive.
  __device__ void init() {
    constexpr int kWarps = device::kWarpgroup / device::kWarp;
    for (int stage = 0; stage < kStages; ++stage) {
      Barrier::init(&full[stage], kWarps);
      for (int walker = 0; walker < kWalkers; ++walker) {
        Barrier::init(&empty[walker][stage], kWarps);
        last[walker][stage] = false;
      }
    }
    cutlass::arch::fence_barrier_init();
  }
};

// The side that loads; all threads of a warpgroup.
template <typename T, typename Boxes, int kWalkers, typename Launch>
class KvProducer {
  using Barriers = KvBarriers<Boxes::kStages, kWalkers>;
  static constexpr int kKeys = Boxes::kKeys;
  static constexpr int kChunks = Boxes::kTileBytes / kKeys / 16, kKeysAtOnce = device::kWarpgroup / kChunks;
  static_assert(device::kWarpgroup % kChunks == 0 && kKeys % kKeysAtOnce == 0, "a thread keeps its column");

 public:
  // `walks` says which warpgroups take tiles.
  __device__ KvProducer(Barriers& barriers, const Launch& launch, const BlockInfo& tile, const bool (&walks)[kWalkers])
      : barriers_(barriers),
        ring_(barriers),
        launch_(launch),
        tile_(tile),
        key_(static_cast<int>(threadIdx.x) % device::kWarpgroup / kChunks),
        column_(static_cast<int>(threadIdx.x % kChunks) * (16 / static_cast<int>(sizeof(T)))),
        bytes_(column_ < launch.params.problem.head_dim ? 16 : 0) {
    const std::uint32_t chunk = threadIdx.x % kChunks;
    own_ = chunk / 8 * Boxes::kBoxBytes + device::swizzled_offset<device::kBoxRowBytes>(Boxes::row_of(key_), chunk % 8);
#pragma unroll
    for (int i = 0; i < kWalkers; ++i) walks_[i] = walks[i];
  }

  // Loads tiles from `newest` to `oldest` while somebody takes them.
  __device__ void run(device::SharedAddress stages, int newest, int oldest) {
    const StickAttentionProblem& p = launch_.params.problem;
    int keys = tile_.s.keys - newest * kKeys;
    for (int i = newest; i >= oldest; --i) {
      const int stage = ring_.acquire([&](int next, unsigned parity) { wait_free(next, parity); });
      bool any = false;
#pragma unroll
      for (const bool walks : walks_) any = any || walks;
      if (!any) break;
      const device::SharedAddress to = stages + stage * Boxes::kStageBytes + own_;
      load(to, p.k, p.k_strides, i * kKeys, keys, launch_.k_aligned);
      if (!p.k_is_v) load(to + Boxes::kTileBytes, p.v, p.v_strides, i * kKeys, keys, launch_.v_aligned);
      keys = kKeys;  // older tiles are whole
      ring_.commit();
    }
    ring_.drain();
  }

 private:
  __device__ void wait_free(int stage, unsigned parity) {
#pragma unroll
    for (int i = 0; i < kWalkers; ++i) {
      if (!walks_[i]) continue;
      Barriers::Barrier::wait(&barriers_.empty[i][stage], parity);
      walks_[i] = !barriers_.last[i][stage];
    }
  }

  // This thread's chunks of a tile whose first key is `first`, of which `keys` are there.
  __device__ void load(device::SharedAddress to, const void* tensor, const StickKeyStrides& strides, int first,
                       int keys, bool aligned) const {
    const T* from = kv_pointer<const T>(tensor, strides, tile_.s, tile_.head, std::int64_t{first} + key_) + column_;
    const std::int64_t step = kKeysAtOnce * strides.token;
    const auto each = [&](auto whole) {
      device::static_for<kKeys / kKeysAtOnce>([&](auto round) {
        constexpr int kKey = round * kKeysAtOnce, kRow = Boxes::row_of(kKey);
        const bool there = whole || key_ + kKey < keys;
        copy_chunk<T, kWholeChunks, kRow * device::kBoxRowBytes>(to ^ kRow % 8 << 4, from, there ? bytes_ : 0,
                                                                 whole || aligned);
        from += step;
        device::hide_from_optimizer(from);  // one step in registers, not its multiples
      });
    };
    if (aligned && keys >= kKeys) {
      each(std::true_type{});
    } else {
      each(std::false_type{});
    }
  }

  Barriers& barriers_;
  device::RingProducer<Barriers> ring_;
  const Launch& launch_;
  const BlockInfo& tile_;
  const int key_, column_;     // of this thread's first chunk
  const std::uint32_t bytes_;  // 16 or, beyond the head dimension, 0
  std::uint32_t own_;          // where it lies in a tile
  bool walks_[kWalkers];
};

// The side of one warpgroup that multiplies.
template <int kStages, int kWalkers>
class KvConsumer : public device::StageConsumer<kStages> {
 public:
  __device__ KvConsumer(KvBarriers<kStages, kWalkers>& barriers, int walker)
      : device::StageConsumer<kStages>(barriers.full, barriers.empty[walker]), last_(barriers.last[walker]) {}

  // Frees the next tile's stage, unread, once it has come: a stage that is freed before the loading side has asked for
  // it would look taken to it for good.
  __device__ void skip() { this->release(this->wait()); }
  // Frees the last stage that the warpgroup waits for.
  __device__ void finish(int stage) {
    if (threadIdx.x % device::kWarpgroup == 0) last_[stage] = true;
    this->release(stage);
  }

 private:
  bool (&last_)[kStages];
};

}  // namespace mfx::stick
