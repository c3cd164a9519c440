// Backward of a = gate * activation(h) at four columns of one position, with activation(h) computed again.
#pragma once

#include "grouped_gemm/activation.cuh"
#include "grouped_gemm/kernel_params.cuh"

namespace mfx::grouped {

// At the first row and column of `p`, of which `left` columns exist. y is the gradient of a; returns
// <y, activation(h)>.
template <typename T, bool kAligned>
__device__ inline float activation_grad4(const ActivationGradRows& p, int left, float gate, const float4& y) {
  const std::int64_t half = std::int64_t{p.columns} * sizeof(T);
  auto [value, slope] = activate_with_slope(p.activation.function, load4<T, kAligned>(p.hidden, left));
  if (p.activation.gated) {
    const float4 other = load4<T, kAligned>(p.hidden + half, left);
    store4<T, kAligned>(p.grad_hidden + half, gate * (y * value), left);
    value = value * other;
    slope = slope * other;
  }
  store4<T, kAligned>(p.grad_hidden, gate * (y * slope), left);
  if (p.gated != nullptr) store4<T, kAligned>(p.gated, gate * value, left);
  return dot4(y, value);
}

}  // namespace mfx::grouped
