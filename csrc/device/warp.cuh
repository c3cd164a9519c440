// Exchanges between the lanes of a warp, all of which take part. kWidth consecutive lanes form a group: 4 the quad that
// shares a row of an mma accumulator, 32 the warp. Results are the same bits in every lane of the group.
#pragma once

namespace mfx::device {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kQuad = 4;
inline constexpr int kWarp = 32;

template <int kWidth = kWarp>
__device__ inline float lanes_sum(float x) {
#pragma unroll
  for (int step = 1; step < kWidth; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int kWidth = kWarp>
__device__ inline float lanes_max(float x) {
#pragma unroll
  for (int step = 1; step < kWidth; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <int kWidth = kWarp>
__device__ inline int lanes_sum(int x) {
#pragma unroll
  for (int step = 1; step < kWidth; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The sum over this lane and those of a lower index.
__device__ inline unsigned lanes_prefix_sum(unsigned x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned earlier = __shfl_up_sync(kAllLanes, x, step);
    if (static_cast<int>(threadIdx.x % kWarp) >= step) x += earlier;
  }
  return x;
}

// What a scan over the four lanes of a quad leaves in each: the result over the lanes of a higher (later) index alone,
// and over all four.
struct QuadScan {
  float later, all;
};

__device__ inline QuadScan quad_suffix_product(float x) {
  const int lane = threadIdx.x & 3;
  const float neighbour = __shfl_xor_sync(kAllLanes, x, 1);
  const float pair = x * neighbour;
  const float other_pair = __shfl_xor_sync(kAllLanes, pair, 2);
  return {(lane & 1 ? 1.0f : neighbour) * (lane & 2 ? 1.0f : other_pair), pair * other_pair};
}

// With the lanes of a lower index.
struct QuadPrefix {
  float earlier, all;
};

__device__ inline QuadPrefix quad_prefix_sum(float x) {
  const int lane = threadIdx.x & 3;
  const float neighbour = __shfl_xor_sync(kAllLanes, x, 1);
  const float pair = x + neighbour;
  const float other_pair = __shfl_xor_sync(kAllLanes, pair, 2);
  return {(lane & 1 ? neighbour : 0.0f) + (lane & 2 ? other_pair : 0.0f), pair + other_pair};
}

}  // namespace mfx::device
