// S of a cluster's two blocks, each of which multiplies half of the head dimension, and of each of whose two
// warpgroups half of the keys: parts [64 rows, 32 keys], which meet in the shared memory of both blocks. The fragments
// of all four have the same rows in the same lanes, so that a thread meets three others alone, and its warp three
// warps.
#pragma once

#include <cutlass/arch/barrier.h>

#include "tile/slice_ring.cuh"

namespace mfx::stick {

inline constexpr int kClusterBlocks = 2;

// In shared memory, at the same place in both blocks.
struct ScoreParts {
  static constexpr int kWarpgroups = 2, kWarps = 4, kSenders = kClusterBlocks * kWarpgroups, kTiles = 8;
  using Barrier = cutlass::arch::ClusterBarrier;

  float4 parts[kClusterBlocks][kTiles][device::kWarpgroup];
  std::uint64_t full[kWarps], empty[kWarps];  // of the warps that have the same rows

  // By one thread, before a barrier of the cluster. Warps arrive.
  __device__ void init() {
    for (int i = 0; i < kWarps; ++i) {
      Barrier::init(&full[i], kSenders);
      Barrier::init(&empty[i], kSenders);
    }
    cutlass::arch::fence_barrier_init();
  }
};

__device__ inline std::uint32_t in_block(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// One warp's side of it.
class ScoreExchange {
 public:
  __device__ ScoreExchange(ScoreParts& parts, int rank, int warpgroup)
      : parts_(parts),
        rank_(rank),
        first_tile_(warpgroup * (ScoreParts::kTiles / ScoreParts::kWarpgroups)),
        thread_(static_cast<int>(threadIdx.x) % device::kWarpgroup) {}

  // Sends this warp's part when all have read those before.
  __device__ void put(const float (&part)[4][4]) {
    wait(&parts_.empty[warp()], parity_ ^ 1);
#pragma unroll
    for (int block = 0; block < kClusterBlocks; ++block) {
      const std::uint32_t to = in_block(device::shared_address(&parts_.parts[rank_][first_tile_][thread_]), block);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * (device::kWarpgroup * 16)),
                     "f"(part[i][0]), "f"(part[i][1]), "f"(part[i][2]), "f"(part[i][3])
                     : "memory");
      }
    }
    arrive(&parts_.full[warp()]);
  }

  // The sums, added in the order of the blocks: the same bits in all four.
  __device__ void take(float (&scores)[ScoreParts::kTiles][4]) {
    wait(&parts_.full[warp()], parity_);
#pragma unroll
    for (int i = 0; i < ScoreParts::kTiles; ++i) {
      const float4 a = parts_.parts[0][i][thread_], b = parts_.parts[1][i][thread_];
      scores[i][0] = a.x + b.x;
      scores[i][1] = a.y + b.y;
      scores[i][2] = a.z + b.z;
      scores[i][3] = a.w + b.w;
    }
    arrive(&parts_.empty[warp()]);
    parity_ ^= 1;
  }

 private:
  __device__ int warp() const { return thread_ / device::kWarp; }

  static __device__ void wait(std::uint64_t* barrier, unsigned parity) {
    std::uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{.reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;}"
          : "=r"(done)
          : "r"(device::shared_address(barrier)), "r"(parity)
          : "memory");
    }
  }
  static __device__ void arrive(std::uint64_t* barrier) {
    __syncwarp();
    if (device::lane_id() < kClusterBlocks) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       in_block(device::shared_address(barrier), device::lane_id()))
                   : "memory");
    }
  }

  ScoreParts& parts_;
  const int rank_, first_tile_, thread_;
  unsigned parity_ = 0;
};

}  // namespace mfx::stick
