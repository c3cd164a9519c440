// Reductions and scans over the lanes of a warp, all of which take part. kWidth consecutive lanes form a group: 4 the
// quad that shares a row of an mma accumulator, 32 the warp. Results are the same bits in every lane of the group.
#pragma once

#include <type_traits>

#include "ptx/warp.cuh"

namespace mfx::device {

// Calls step(n) for the constants n = 1, 2, 4.. below kWidth.
template <int kWidth, int kStep = 1, typename Step>
__device__ inline void for_lane_steps(Step&& step) {
  if constexpr (kStep < kWidth) {
    step(std::integral_constant<int, kStep>{});
    for_lane_steps<kWidth, 2 * kStep>(step);
  }
}

template <int kWidth = kWarp>
__device__ inline float lanes_sum(float x) {
  if constexpr (kWidth > 1) {
    x = lanes_sum<kWidth / 2>(x);
    x += exchange<kWidth / 2>(x);
  }
  return x;
}

template <int kWidth = kWarp>
__device__ inline float lanes_max(float x) {
  if constexpr (kWidth > 1) {
    x = lanes_max<kWidth / 2>(x);
    x = fmaxf(x, exchange<kWidth / 2>(x));
  }
  return x;
}

template <int kWidth = kWarp>
__device__ inline int lanes_sum(int x) {
#pragma unroll
  for (int step = 1; step < kWidth; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sums x[0..kCount) over groups of kLanes lanes; the sums end up spread over the lanes: lane l of a group holds those
// from index l * kCount / kLanes on. Every step halves what a lane still carries, so all of it takes about kCount
// shuffles instead of kCount * log2(kLanes).
template <int kLanes, int kCount, int kSize>
__device__ inline void sum_and_spread(float (&x)[kSize]) {
  constexpr int kStep = kLanes / 2;
  if constexpr (kStep > 0 && kCount > 1) {
    const bool upper = threadIdx.x & kStep;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = upper ? x[i + kCount / 2] : x[i];
      const float other = upper ? x[i] : x[i + kCount / 2];
      x[i] = mine + exchange<kStep>(other);
    }
    sum_and_spread<kStep, kCount / 2>(x);
  } else if constexpr (kStep > 0) {
    x[0] += exchange<kStep>(x[0]);
    sum_and_spread<kStep, 1>(x);
  }
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

// What a scan over a group of lanes leaves in each: the result over the lanes of a higher index (later) or of a lower
// one (earlier) alone, and over all.
struct LaneScan {
  float beyond, all;
};

// `neutral` is what combine() leaves a number with as it is.
template <int kWidth, bool kLater, typename Combine>
__device__ inline LaneScan lanes_scan(float x, float neutral, Combine combine) {
  LaneScan scan = {neutral, x};
  for_lane_steps<kWidth>([&](auto step) {
    const float other = exchange<step>(scan.all);
    const bool counts = kLater ? !(threadIdx.x & step) : threadIdx.x & step;
    const float mine = counts ? other : neutral;
    scan = {step == 1 ? mine : combine(scan.beyond, mine), combine(scan.all, other)};
  });
  return scan;
}
template <int kWidth>
__device__ inline LaneScan lanes_later_product(float x) {
  return lanes_scan<kWidth, true>(x, 1.0f, [](float a, float b) { return a * b; });
}
template <int kWidth>
__device__ inline LaneScan lanes_earlier_sum(float x) {
  return lanes_scan<kWidth, false>(x, 0.0f, [](float a, float b) { return a + b; });
}

}  // namespace mfx::device
