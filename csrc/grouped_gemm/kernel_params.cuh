// What the CUDA kernels are told: plain data, passed by value as kernel parameters, so that a CUDA graph replays it.
#pragma once

#include <cstdint>

#include "grouped_gemm/cuda_instances.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"
#include "tile/segments.cuh"

namespace mfx::grouped {

// n / divisor for 0 <= n < 2^31, without a division.
struct FastDivide {
  std::uint32_t multiplier, shift;

  FastDivide() = default;
  explicit FastDivide(std::uint32_t divisor) : shift(0) {
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  __device__ std::uint32_t operator()(std::uint32_t n) const { return __umulhi(2 * n, multiplier) >> shift; }
};

// Where the row of a position lies. Token and slot order go by way of the slot; expert order is the position itself.
// Distances are counted in units of 16 bytes where all rows begin at multiples of them, else of an element, in 32 bits.
struct RowMap {
  static constexpr std::uint32_t kAlignedUnit = 16;
  char* data;
  std::uint32_t unit;  // bytes
  bool by_slot;
  std::uint32_t slot_stride, token_stride;  // a row's place is the sum of both, modulo 2^32
  FastDivide choices;                       // by 1 in expert order

  // Units from `data` to the row of a slot, or of a position in expert order.
  __device__ std::uint32_t units(std::int32_t slot) const { return choices(slot) * token_stride + slot * slot_stride; }
  // Bytes from `data` to the row of a position.
  __device__ std::int64_t offset(std::int32_t position, const std::int32_t* slot_order) const {
    return std::int64_t{units(by_slot ? slot_order[position] : position)} * unit;
  }
};

// Matrices of consecutive experts lie at one distance within a segment.
struct ExpertMatrices : device::Segments<64> {
  bool transposed;  // memory holds the rows of the transposes
  std::int64_t row_bytes, matrix_bytes;

  __device__ char* operator[](std::int32_t expert) const {
    const int s = find(expert);
    return data[s] != nullptr ? data[s] + (expert - first[s]) * matrix_bytes : nullptr;
  }
};

// Backward of a = gate * activation(h), rows in expert order.
struct ActivationGradRows {
  ActivationSpec activation;
  std::int32_t columns;  // of a
  const char* hidden;    // h [S, columns], or [S, 2 columns] if gated
  char* grad_hidden;     // likewise
  char* gated;           // a [S, columns], or null

  // The same rows from `row` and `column` on.
  template <typename T>
  __device__ ActivationGradRows from(std::int64_t row, int column) const {
    const std::int64_t a = (row * columns + column) * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t h = activation.gated ? a + row * columns * static_cast<std::int64_t>(sizeof(T)) : a;
    return {activation, columns, hidden + h, grad_hidden + h, gated != nullptr ? gated + a : nullptr};
  }
};

// y_p = x_p B_e(p) for every position p, and what happens to it on the way out:
//   forward      x W          y <- y + bias, out <- gate * activation(y), hidden <- y
//   input grad   g W^T        out <- gate * y, dots <- <y, x>
//   hidden grad  g D^T        y is the gradient of a = gate * activation(h): see ActivationGradRows; dots <- <y, a /
//   gate>
struct RowProductParams {
  const std::int32_t* offsets;  // [num_experts + 1]
  std::int32_t num_experts;
  std::int32_t depth;    // features that are summed over
  std::int32_t columns;  // of y; of each half of it where a gated activation folds it
  RowMap rows;           // the left operand
  ExpertMatrices matrices;

  RowMap out;                      // data may be null
  bool out_unrounded;              // in float32: rows that combine() will sum
  const std::int32_t* slot_order;  // position -> slot
  const float* gates;              // by slot, or null
  ActivationSpec activation;       // forward
  const char* bias;                // forward: [num_experts, columns], or [num_experts, 2 columns] if gated; or null
  char* hidden;                    // forward: [S, columns], or [S, 2 columns] if gated, in expert order; or null
  RowMap x;                        // input grad with dots
  ActivationGradRows hidden_grad;
  float* dots;         // [groups of columns, S] partial sums, or null
  std::int32_t slots;  // S
};

// dW_e = sum over the positions p of expert e of x_p^T g_p.
struct WeightGradParams {
  const std::int32_t *offsets, *slot_order;
  std::int32_t num_experts;
  std::int32_t in_features, out_features;
  RowMap x, grad;
  ExpertMatrices grad_weight;
  std::int32_t tiles;  // of all matrices, where a persistent grid walks them
};

// out_t = sum over the choices k, in their order, of gate_tk * rows[position of (t, k)]: every row of the products was
// stored once, so no addition waits for another block and the bits repeat.
struct CombineParams {
  const float* rows;  // [S, columns]
  const std::int32_t* position;
  const float* gates;  // or null
  char* out;           // [T, columns]
  std::int64_t tokens;
  std::int32_t choices, columns;
};

// to_p = gate * x_p, in expert order.
struct ScaleParams {
  RowMap x;
  const std::int32_t* slot_order;
  const float* gates;
  char* to;
  std::int32_t slots, columns;
};

// Gradient of the pre-activation from that of the output, and the gates' gradients.
struct ActivationGradParams {
  ActivationGradRows rows;
  RowMap grad;
  const std::int32_t* slot_order;
  const float* gates;  // or null
  float* grad_gates;   // [S] by slot, or null
  std::int32_t slots;
};

// dots_p = <grad_p, bias of the expert of p>.
struct BiasDotParams {
  const std::int32_t *offsets, *slot_order;
  std::int32_t num_experts;
  RowMap grad;
  const char* bias;  // [num_experts, columns]
  float* dots;       // [S]
  std::int32_t slots, columns;
};

// grad_bias_e = sum over the positions p of expert e of gate * grad_p.
struct BiasGradParams {
  const std::int32_t *offsets, *slot_order;
  RowMap grad;
  const float* gates;  // or null
  char* grad_bias;     // [num_experts, columns]
  std::int32_t columns;
};

// grad_gates[slot of p] = bias_dots[p] + sum over the groups of columns, in their order, of dots[group][p].
struct GateGradParams {
  const float* bias_dots;  // or null
  const float* dots;
  const std::int32_t* slot_order;
  float* grad_gates;
  std::int32_t groups, slots;
};

}  // namespace mfx::grouped
