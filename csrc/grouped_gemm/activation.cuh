// The activations and their slopes at four columns.
#pragma once

#include "grouped_gemm/vector4.cuh"
#include "moduleformer_ext/grouped_gemm.hpp"
#include "ptx/fast_math.cuh"

namespace mfx::grouped {

struct ActivationValue {
  float value, slope;
};

// e^x for x <= 0 where it matters: the error of x log2(e) grows with |x|, and then the result vanishes.
__device__ inline float exp_approx(float x) {
  return device::exp2_approx(1.4426950408889634f * x);
}

__device__ inline float sigmoid(float x) {
  return device::reciprocal_approx(1.0f + exp_approx(-x));
}

template <Activation kFunction>
__device__ inline ActivationValue activate_with_slope(float x) {
  if constexpr (kFunction == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u): no cancellation in the negative tail.
    constexpr float a = 1.5957691216057307f, b = 0.044715f;
    const float square = x * x, s = sigmoid(a * x * (1.0f + b * square));
    return {x * s, s + x * s * (1.0f - s) * (a * (1.0f + 3.0f * b * square))};
  } else if constexpr (kFunction == Activation::kGelu) {
    const float cdf = normcdff(x), density = 0.3989422804014327f * exp_approx(-0.5f * x * x);
    return {x * cdf, cdf + x * density};
  } else if constexpr (kFunction == Activation::kSilu) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kFunction == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  } else {
    static_assert(kFunction == Activation::kNone, "an activation without a formula");
    return {x, 1.0f};
  }
}

struct ActivationVector {
  float4 value, slope;
};

template <Activation kFunction>
__device__ inline ActivationVector activate_with_slope(const float4& x) {
  const ActivationValue a = activate_with_slope<kFunction>(x.x), b = activate_with_slope<kFunction>(x.y),
                        c = activate_with_slope<kFunction>(x.z), d = activate_with_slope<kFunction>(x.w);
  return {{a.value, b.value, c.value, d.value}, {a.slope, b.slope, c.slope, d.slope}};
}

__device__ inline ActivationVector activate_with_slope(Activation function, const float4& x) {
  switch (function) {
    case Activation::kGeluTanh: return activate_with_slope<Activation::kGeluTanh>(x);
    case Activation::kGelu: return activate_with_slope<Activation::kGelu>(x);
    case Activation::kSilu: return activate_with_slope<Activation::kSilu>(x);
    case Activation::kRelu: return activate_with_slope<Activation::kRelu>(x);
    case Activation::kNone: break;
  }
  return activate_with_slope<Activation::kNone>(x);
}

}  // namespace mfx::grouped
