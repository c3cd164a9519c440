// What remains beside the products: one warp per row, lanes over its columns, four at a time.
#pragma once

#include "grouped_gemm/activation_grad.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::grouped {

inline constexpr int kPointwiseThreads = 128;

// f(row) for every row, one warp each.
template <typename F>
__device__ inline void for_each_row(std::int64_t rows, F f) {
  const std::int64_t first = std::int64_t{blockIdx.x} * kPointwiseThreads + threadIdx.x;
  const std::int64_t warps = std::int64_t{gridDim.x} * (kPointwiseThreads / 32);
  for (std::int64_t row = first / 32; row < rows; row += warps) f(row);
}

// f(column) for every fourth column, the lanes side by side.
template <typename F>
__device__ inline void for_each_vector(std::int32_t columns, F f) {
  for (int column = threadIdx.x % 32 * kVector; column < columns; column += 32 * kVector) f(column);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPointwiseThreads) combine(const CombineParams p) {
  for_each_row(p.tokens, [&](std::int64_t token) {
    for_each_vector(p.columns, [&](int column) {
      const int left = p.columns - column;
      float4 total = {};
      for (std::int64_t slot = token * p.choices; slot < (token + 1) * p.choices; ++slot) {
        const std::int64_t at = std::int64_t{p.position[slot]} * p.columns + column;
        const float4 row = load4<float, kAligned>(p.rows + at, left);
        total = total + (p.gates != nullptr ? p.gates[slot] * row : row);
      }
      store4<T, kAligned>(p.out + (token * p.columns + column) * sizeof(T), total, left);
    });
  });
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPointwiseThreads) scale(const ScaleParams p) {
  for_each_row(p.slots, [&](std::int64_t position) {
    const char* x = p.x.data + p.x.offset(static_cast<std::int32_t>(position), p.slot_order);
    const float gate = p.gates[p.slot_order[position]];
    for_each_vector(p.columns, [&](int column) {
      const int left = p.columns - column;
      const float4 row = load4<T, kAligned>(x + column * sizeof(T), left);
      store4<T, kAligned>(p.to + (position * p.columns + column) * sizeof(T), gate * row, left);
    });
  });
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPointwiseThreads) activation_grad(const ActivationGradParams p) {
  for_each_row(p.slots, [&](std::int64_t position) {
    const char* grad = p.grad.data + p.grad.offset(static_cast<std::int32_t>(position), p.slot_order);
    const std::int32_t slot = p.slot_order[position];
    const float gate = p.gates != nullptr ? p.gates[slot] : 1.0f;
    float dot = 0.0f;
    for_each_vector(p.rows.columns, [&](int column) {
      const int left = p.rows.columns - column;
      const float4 g = load4<T, kAligned>(grad + column * sizeof(T), left);
      dot += activation_grad4<T, kAligned>(p.rows.template from<T>(position, column), left, gate, g);
    });
    dot = device::lanes_sum(dot);
    if (p.grad_gates != nullptr && threadIdx.x % 32 == 0) p.grad_gates[slot] = dot;
  });
}

// The expert of a position.
__device__ inline int expert_of(std::int32_t position, const std::int32_t* offsets, int num_experts) {
  int expert = 0;
  for (int end = num_experts; end - expert > 1;) {
    const int middle = (expert + end) / 2;
    (offsets[middle] <= position ? expert : end) = middle;
  }
  return expert;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPointwiseThreads) bias_dots(const BiasDotParams p) {
  for_each_row(p.slots, [&](std::int64_t row) {
    const auto position = static_cast<std::int32_t>(row);
    const std::int64_t expert = expert_of(position, p.offsets, p.num_experts);
    const char* const grad = p.grad.data + p.grad.offset(position, p.slot_order);
    const char* const bias = p.bias + expert * p.columns * static_cast<std::int64_t>(sizeof(T));
    float dot = 0.0f;
    for_each_vector(p.columns, [&](int column) {
      const int left = p.columns - column;
      dot += dot4(load4<T, kAligned>(grad + column * sizeof(T), left),
                  load4<T, kAligned>(bias + column * sizeof(T), left));
    });
    dot = device::lanes_sum(dot);
    if (threadIdx.x % 32 == 0) p.dots[position] = dot;
  });
}

// A block has 128 columns of one expert; its warps share the positions, and their sums meet in the warps' order.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPointwiseThreads) bias_grad(const BiasGradParams p) {
  constexpr int kWarps = kPointwiseThreads / 32, kColumns = 32 * kVector;
  __shared__ float4 sums[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = (p.columns + kColumns - 1) / kColumns;
  const std::int64_t expert = blockIdx.x / groups;
  const int column = blockIdx.x % groups * kColumns + lane * kVector, left = p.columns - column;
  float4 sum = {};
  for (int position = p.offsets[expert] + warp; position < p.offsets[expert + 1] && left > 0; position += kWarps) {
    const char* const grad = p.grad.data + p.grad.offset(position, p.slot_order);
    const float4 g = load4<T, kAligned>(grad + column * sizeof(T), left);
    sum = sum + (p.gates != nullptr ? p.gates[p.slot_order[position]] * g : g);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || left <= 0) return;
  for (int other = 1; other < kWarps; ++other) sum = sum + sums[other][lane];
  store4<T, kAligned>(p.grad_bias + (expert * p.columns + column) * static_cast<std::int64_t>(sizeof(T)), sum, left);
}

__global__ void __launch_bounds__(kPointwiseThreads) sum_gate_grads(const GateGradParams p) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kPointwiseThreads;
  for (std::int64_t q = std::int64_t{blockIdx.x} * kPointwiseThreads + threadIdx.x; q < p.slots; q += threads) {
    float total = p.bias_dots != nullptr ? p.bias_dots[q] : 0.0f;
    for (int group = 0; group < p.groups; ++group) total += p.dots[std::int64_t{group} * p.slots + q];
    p.grad_gates[p.slot_order[q]] = total;
  }
}

}  // namespace mfx::grouped
