// The tiles of K and V that a block's warpgroups walk, from the newest to the oldest: what kv_pipeline.cuh is to sm_80.
// A warpgroup loads them, by cp.async, and every multiplying one takes them all, until its sticks are exhausted: then
// it says so, and the loading one waits for it no longer.
#pragma once

#include <algorithm>

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
  // A warpgroup holds two stages: one it multiplies, one it waits for.
  static constexpr int kLag = std::min(Boxes::kStages - 2, 2);
  static constexpr int kChunks = Boxes::kTileBytes / kKeys / 16, kKeysAtOnce = device::kWarpgroup / kChunks;
  static_assert(device::kWarpgroup % kChunks == 0 && kKeys % kKeysAtOnce == 0, "a thread keeps its column");

 public:
  // `walking`: the warpgroups that take tiles, a bit each. Of the head dimension the columns from `first_column` on.
  __device__ KvProducer(Barriers& barriers, const Launch& launch, const BlockInfo& tile, unsigned walking,
                        int first_column = 0)
      : barriers_(barriers),
        ring_(barriers),
        launch_(launch),
        tile_(tile),
        walking_(walking),
        key_(static_cast<int>(threadIdx.x) % device::kWarpgroup / kChunks),
        column_(first_column + static_cast<int>(threadIdx.x % kChunks) * (16 / static_cast<int>(sizeof(T)))),
        bytes_(column_ < launch.params.problem.head_dim ? 16 : 0) {
    const std::uint32_t chunk = threadIdx.x % kChunks;
    own_ = chunk / 8 * Boxes::kBoxBytes + device::swizzled_offset<device::kBoxRowBytes>(Boxes::row_of(key_), chunk % 8);
  }

  // Loads tiles from `newest` to `oldest` while somebody takes them.
  __device__ void run(device::SharedAddress stages, int newest, int oldest) {
    const StickAttentionProblem& p = launch_.params.problem;
    int there = tile_.s.keys - newest * kKeys;
    Tiles keys(*this, p.k, p.k_strides, newest, launch_.k_aligned);
    Tiles values(*this, p.v, p.v_strides, newest, launch_.v_aligned);
    for (int i = newest; i >= oldest; --i) {
      const int stage = ring_.acquire([&](int next, unsigned parity) { wait_free(next, parity); });
      if (walking_ == 0) break;
      const device::SharedAddress to = stages + stage * Boxes::kStageBytes + own_;
      load(to, keys, there);
      if (!p.k_is_v) load(to + Boxes::kTileBytes, values, there);
      there = kKeys;  // older tiles are whole
      ring_.commit();
    }
    ring_.drain();
  }

 private:
  __device__ void wait_free(int stage, unsigned parity) {
#pragma unroll
    for (int i = 0; i < kWalkers; ++i) {
      if ((walking_ >> i & 1) == 0) continue;
      Barriers::Barrier::wait(&barriers_.empty[i][stage], parity);
      if (barriers_.last[i][stage]) walking_ &= ~(1u << i);
    }
  }

  // Of K or V, from the newest to the oldest.
  struct Tiles {
    const T* next;  // this thread's first chunk of the next tile
    const StickKeyStrides& strides;
    const bool aligned;

    __device__ Tiles(const KvProducer& own, const void* tensor, const StickKeyStrides& strides, int tile, bool aligned)
        : next(
              kv_pointer<const T>(tensor, strides, own.tile_.s, own.tile_.head, std::int64_t{tile} * kKeys + own.key_) +
              own.column_),
          strides(strides),
          aligned(aligned) {}
  };

  // This thread's chunks of the next tile, of which `there` keys exist.
  __device__ void load(device::SharedAddress to, Tiles& tiles, int there) const {
    const T* from = tiles.next;
    const std::int64_t step = kKeysAtOnce * tiles.strides.token;
    tiles.next -= kKeys * tiles.strides.token;
    device::hide_from_optimizer(tiles.next);  // one pointer in registers
    const auto each = [&](auto whole) {
      device::static_for<kKeys / kKeysAtOnce>([&](auto round) {
        constexpr int kKey = round * kKeysAtOnce, kRow = Boxes::row_of(kKey);
        const bool exists = whole || key_ + kKey < there;
        copy_chunk<T, kWholeChunks, kRow * device::kBoxRowBytes>(to ^ kRow % 8 << 4, from, exists ? bytes_ : 0,
                                                                 whole || tiles.aligned);
        from += step;
        device::hide_from_optimizer(from);  // one step in registers, not its multiples
      });
    };
    if (tiles.aligned && there >= kKeys) {
      each(std::true_type{});
    } else {
      each(std::false_type{});
    }
  }

  Barriers& barriers_;
  device::RingProducer<Barriers, kLag> ring_;
  const Launch& launch_;
  const BlockInfo& tile_;
  unsigned walking_;
  const int key_, column_;     // of this thread's first chunk
  const std::uint32_t bytes_;  // 16 or, beyond the head dimension, 0
  std::uint32_t own_;          // where it lies in a tile
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
