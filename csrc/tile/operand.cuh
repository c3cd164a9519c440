// What products multiply, and how a step of a product multiplies it.
//
//   BFloat16, Float16   m16n8k16
//   float               m16n8k8 tf32, three times (tf32.cuh)
//   Tf32                binary32 in memory, m16n8k8 tf32 once
//
// A step of the inner dimension is 32 bytes of a row: 16 elements of 16 bits or 8 of 32.
#pragma once

#include <type_traits>

#include "tile/tf32.cuh"

namespace mfx::device {

struct Tf32 {
  float value;
};

// Storage type of an operand type.
template <typename Op>
struct Storage {
  using Type = Op;
};
template <>
struct Storage<Tf32> {
  using Type = float;
};

template <typename Op>
inline constexpr bool kIs16Bit = sizeof(Op) == 2;

// Three products at a time take registers: the steps of such a product are not interleaved, see never().
template <typename Op>
inline constexpr bool kStepByStep = std::is_same_v<Op, float>;

// Inner elements of one step.
template <typename Op>
inline constexpr int kStepElements = 32 / sizeof(Op);

// 16 rows of A by one step, as ldmatrix loads them.
using FragmentA = std::uint32_t[4];

// kCount registers of one step as multiply() takes them: of A 4, of B 2 per 8 columns.
template <typename Op, int kCount>
struct Fragment {
  std::uint32_t r[kCount];
};
template <int kCount>
struct Fragment<float, kCount> {
  SplitTf32<kCount> r;
};

template <typename Op, int kCount>
__device__ inline Fragment<Op, kCount> to_fragment(const std::uint32_t (&x)[kCount]) {
  if constexpr (std::is_same_v<Op, float>) {
    return {split_tf32(x)};
  } else {
    Fragment<Op, kCount> fragment;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      fragment.r[i] = std::is_same_v<Op, Tf32> ? to_tf32(__uint_as_float(x[i])) : x[i];
    }
    return fragment;
  }
}

// acc += a b, where the 8 columns of b are in its registers `first` and `first + 1`.
template <typename Op, int kCount>
__device__ inline void multiply(float (&acc)[4], const Fragment<Op, 4>& a, const Fragment<Op, kCount>& b, int first) {
  if constexpr (std::is_same_v<Op, BFloat16>) {
    mma_m16n8k16_bf16(acc, a.r, b.r[first], b.r[first + 1], acc);
  } else if constexpr (std::is_same_v<Op, Float16>) {
    mma_m16n8k16_f16(acc, a.r, b.r[first], b.r[first + 1], acc);
  } else if constexpr (std::is_same_v<Op, Tf32>) {
    mma_m16n8k8_tf32(acc, a.r, b.r[first], b.r[first + 1], acc);
  } else {
    mma_m16n8k8_3xtf32(acc, a.r, b.r, first);
  }
}

// acc += a b, of registers as they come.
template <typename Op>
__device__ inline void multiply_step(float (&acc)[4], const FragmentA& a, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<Op, BFloat16>) {
    mma_m16n8k16_bf16(acc, a, b0, b1, acc);
  } else if constexpr (std::is_same_v<Op, Float16>) {
    mma_m16n8k16_f16(acc, a, b0, b1, acc);
  } else if constexpr (std::is_same_v<Op, Tf32>) {
    const FragmentA rounded = {to_tf32(__uint_as_float(a[0])), to_tf32(__uint_as_float(a[1])),
                               to_tf32(__uint_as_float(a[2])), to_tf32(__uint_as_float(a[3]))};
    mma_m16n8k8_tf32(acc, rounded, to_tf32(__uint_as_float(b0)), to_tf32(__uint_as_float(b1)), acc);
  } else {
    mma_m16n8k8_3xtf32(acc, split_tf32(a), split_tf32({b0, b1}), 0);
  }
}

}  // namespace mfx::device
