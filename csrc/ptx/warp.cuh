// Exchanges between the lanes of a warp, all of which take part, and a vote of the block. __shfl_sync() and
// __syncthreads_and() go by way of integers: 2 % more PTX in attention's forward kernels, which tests count, and 2 to 5
// machine instructions more in their loops.
#pragma once

namespace mfx::device {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kQuad = 4;
inline constexpr int kWarp = 32;

__device__ inline int lane_id() {
  return threadIdx.x % kWarp;
}

// What the lane whose index differs in the bits of `lanes` has. PTX ISA, "shfl.sync".
template <int kLanes>
__device__ inline float exchange(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(y) : "f"(x), "n"(kLanes));
  return y;
}

// What lane `lane` has. PTX ISA, "shfl.sync".
__device__ inline float of_lane(float x, int lane) {
  float y;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(y) : "f"(x), "r"(lane));
  return y;
}

// Barrier of the block: whether every thread has an x and a y that are at most `most`, which NaN is not. As
// __syncthreads_and(), without a way through an integer. PTX ISA, "bar.red".
__device__ inline bool barrier_all_at_most(float x, float y, float most) {
  int all;
  asm volatile(
      "{ .reg .pred mine, every;\n"
      "setp.le.f32 mine, %1, %3;\n"
      "setp.le.and.f32 mine, %2, %3, mine;\n"
      "bar.red.and.pred every, 0, mine;\n"
      "selp.s32 %0, 1, 0, every; }"
      : "=r"(all)
      : "f"(x), "f"(y), "f"(most)
      : "memory");
  return all != 0;
}

// The same of the first `threads` threads that come to barrier `barrier`.
__device__ inline bool barrier_all_at_most(float x, float y, float most, int barrier, int threads) {
  int all;
  asm volatile(
      "{ .reg .pred mine, every;\n"
      "setp.le.f32 mine, %1, %3;\n"
      "setp.le.and.f32 mine, %2, %3, mine;\n"
      "bar.red.and.pred every, %4, %5, mine;\n"
      "selp.s32 %0, 1, 0, every; }"
      : "=r"(all)
      : "f"(x), "f"(y), "f"(most), "r"(barrier), "r"(threads)
      : "memory");
  return all != 0;
}

}  // namespace mfx::device
