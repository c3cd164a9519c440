// The activations and their derivatives on vectors, in the accumulation type.
#pragma once

#include "core/gelu.hpp"
#include "core/simd.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx::MFX_ISA {

template <typename V>
struct ActivationValue {
  V value;
  V slope;
};

// 1 / (1 + e^-x), by the exponential that is cheap because it is bounded; what is lost near 1 is below rounding.
template <typename V>
inline V sigmoid(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  constexpr T kBound = sizeof(T) == 4 ? T(87) : T(708);
  const V value = 1 / (1 + exp_bounded(min(max(-x, broadcast(-kBound)), broadcast(kBound))));
  return x < -kBound ? V{} : value;
}

template <Activation kFunction, typename V>
inline ActivationValue<V> activate_with_slope(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  if constexpr (kFunction == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u): no cancellation in the negative tail.
    constexpr T a = T(1.5957691216057307117), b = T(0.044715);
    const V square = x * x;
    const V s = sigmoid(a * x * (1 + b * square));
    return {x * s, s + x * s * (1 - s) * (a * (1 + 3 * b * square))};
  } else if constexpr (kFunction == Activation::kGelu) {
    const auto n = normal_distribution<T>(x);
    return {x * n.cdf, n.cdf + x * n.density};
  } else if constexpr (kFunction == Activation::kSilu) {
    const V s = sigmoid(x);
    return {x * s, s * (1 + x * (1 - s))};
  } else if constexpr (kFunction == Activation::kRelu) {
    return {x < 0 ? V{} : x, x > 0 ? broadcast(T(1)) : V{}};
  } else {
    static_assert(kFunction == Activation::kNone);
    return {x, broadcast(T(1))};
  }
}

template <Activation kFunction, typename V>
inline V activate(V x) {
  return activate_with_slope<kFunction>(x).value;
}

template <Activation kFunction>
struct ActivationTag {
  static constexpr Activation value = kFunction;
};

// f(ActivationTag<function>{}).
template <typename F>
inline void dispatch_activation(Activation function, F&& f) {
  switch (function) {
    case Activation::kGeluTanh: return f(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kGelu: return f(ActivationTag<Activation::kGelu>{});
    case Activation::kSilu: return f(ActivationTag<Activation::kSilu>{});
    case Activation::kRelu: return f(ActivationTag<Activation::kRelu>{});
    case Activation::kNone: return f(ActivationTag<Activation::kNone>{});
  }
}

}  // namespace mfx::MFX_ISA
