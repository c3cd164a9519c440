// binary32 on tensor cores that read TF32: a number is the sum of two TF32 numbers, and of the four products of a step
// the one of both small parts, 2^-22 of the whole, is left out.
//
// Tensor cores truncate what they add up, and a chain of them errs in one direction: 4e-5 of the result after a depth
// of 4096. So the three products of a step are summed from zero, where little can be lost, and the step is added to the
// accumulator by an ordinary addition, which rounds to nearest.
#pragma once

#include "ptx/convert.cuh"
#include "ptx/mma.cuh"

namespace mfx::device {

template <int kCount>
struct SplitTf32 {
  std::uint32_t big[kCount], small[kCount];
};

template <int kCount>
__device__ inline SplitTf32<kCount> split_tf32(const std::uint32_t (&x)[kCount]) {
  SplitTf32<kCount> split;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = __uint_as_float(x[i]);
    split.big[i] = to_tf32(value);
    split.small[i] = to_tf32(value - __uint_as_float(split.big[i]));
  }
  return split;
}

// sum += a b, where b's fragment is at `first` and `first + 1` of its registers.
template <int kCount>
__device__ inline void mma_m16n8k8_3xtf32(float (&sum)[4], const SplitTf32<4>& a, const SplitTf32<kCount>& b,
                                          int first) {
  const float zero[4] = {};
  float step[4];
  mma_m16n8k8_tf32(step, a.small, b.big[first], b.big[first + 1], zero);  // small terms first
  mma_m16n8k8_tf32(step, a.big, b.small[first], b.small[first + 1], step);
  mma_m16n8k8_tf32(step, a.big, b.big[first], b.big[first + 1], step);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += step[i];
}

}  // namespace mfx::device
