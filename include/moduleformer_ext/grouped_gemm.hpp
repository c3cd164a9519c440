// grouped_gemm and expert_ffn: every routed slot is multiplied by the matrix of its expert.
//
// Slot s = t * K + j is choice j of token t; the layout sorts slots by expert (see expert_layout.hpp), and a position
// p is a place in that order. Matrices are [in, out], or lie in memory as [out, in], one pointer per expert, so that a
// parameter may lie in several tensors. All rows have their last dimension contiguous; strides count elements. Biases
// are [num_experts, out], contiguous.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

// token: one row per token, shared by (or summed over) its K slots; slot: [T, K, ...]; expert: sorted by expert.
enum class RowOrder : std::uint8_t { kToken, kSlot, kExpert };

enum class Activation : std::uint8_t { kNone, kGeluTanh, kGelu, kSilu, kRelu };

// Gated: the first half of the columns is activated and multiplied by the second half.
struct ActivationSpec {
  Activation function = Activation::kNone;
  bool gated = false;
};

struct RoutedLayout {
  const std::int32_t* offsets;     // [num_experts + 1]
  const std::int32_t* slot_order;  // [T * K], position -> slot
  const std::int32_t* position;    // [T * K], slot -> position
  std::int64_t num_experts;
  std::int64_t num_tokens;
  std::int64_t num_choices;
  std::int64_t num_slots() const { return num_tokens * num_choices; }
};

struct RoutedRows {
  const void* data = nullptr;
  RowOrder order = RowOrder::kToken;
  std::int64_t stride = 0;         // between tokens (token, slot order) or positions (expert order)
  std::int64_t choice_stride = 0;  // slot order: between the choices of a token
};

// One matrix per expert.
struct RoutedMatrices {
  void* const* data = nullptr;     // [num_experts], null for an expert without; or null
  std::int64_t stride = 0;         // between the rows that memory holds
  std::int64_t expert_stride = 0;  // between the matrices of experts that follow one another in one tensor
  bool transposed = false;         // memory holds the rows of the transpose

  // The same memory as the transposes of these matrices.
  RoutedMatrices transpose() const { return {data, stride, expert_stride, !transposed}; }
};

// y_s = activation(x_s W_e(s) + bias_e(s)). Gates are float32, or float64 beside float64 data, and need the token
// order.
struct GroupedGemmParams {
  DType dtype;  // of x, weight, bias, out, hidden
  RoutedLayout layout;
  ActivationSpec activation;
  std::int64_t in_features;
  std::int64_t out_features;  // columns of the matrices: twice the columns of `out` where the activation is gated
  RoutedRows x;
  RoutedMatrices weight;  // [in_features, out_features]
  const void* bias;       // or null
  const void* gates;      // [T, K], or null
  RowOrder out_order;
  void* out;     // [T, n], [T, K, n] or [S, n], contiguous
  void* hidden;  // [S, out_features] before the activation, bias included, in expert order; or null
  // CUDA only, like the same two below: float32 products may be rounded to TF32; as much memory as
  // mfx_<op>_cuda_workspace says.
  bool allow_tf32 = false;
  void* workspace = nullptr;
};

struct GroupedGemmBackwardParams {
  GroupedGemmParams forward;   // `out` is not read; `hidden` is, where there is an activation
  RoutedRows grad;             // in out_order
  void* grad_x;                // contiguous, in the order of x; or null
  void* grad_gates;            // [T, K], dtype of the gates; or null
  RoutedMatrices grad_weight;  // dense
  void* grad_bias;             // or null
  void* workspace = nullptr;
};

// y_t = sum over k of gate_tk * (activation(x_t up_e + up_bias_e) down_e + down_bias_e).
struct ExpertFfnParams {
  DType dtype;
  RoutedLayout layout;
  ActivationSpec activation;
  std::int64_t model_features;
  std::int64_t hidden_features;  // rows of down; up has twice as many columns where the activation is gated
  RoutedRows x;                  // token order
  RoutedMatrices up, down;
  const void *up_bias, *down_bias;  // or null
  const void* gates;                // [T, K]
  void* out;                        // [T, model_features]
  void* hidden;                     // [S, columns of up] before the activation, in expert order; or null
  bool allow_tf32 = false;
  void* workspace = nullptr;
};

struct ExpertFfnBackwardParams {
  ExpertFfnParams forward;  // `out` is not read, `hidden` is
  RoutedRows grad;          // token order
  void* grad_x;             // or null, like the others
  void* grad_gates;
  RoutedMatrices grad_up, grad_down;
  void *grad_up_bias, *grad_down_bias;
  void* workspace = nullptr;
};

// Every launcher checks the layout's contents first and returns an error, with nothing written, if they cannot be one.
Status grouped_gemm_cpu(const GroupedGemmParams& params);
Status grouped_gemm_backward_cpu(const GroupedGemmBackwardParams& params);
Status expert_ffn_cpu(const ExpertFfnParams& params);
Status expert_ffn_backward_cpu(const ExpertFfnBackwardParams& params);

// float32, bfloat16 and float16, on sm_80 and later. The layout stays on the device and is trusted; matrices lie in at
// most 64 contiguous runs of experts.
extern "C" {
Status mfx_grouped_gemm_cuda(const GroupedGemmParams& params, Stream stream);
Status mfx_grouped_gemm_backward_cuda(const GroupedGemmBackwardParams& params, Stream stream);
Status mfx_expert_ffn_cuda(const ExpertFfnParams& params, Stream stream);
Status mfx_expert_ffn_backward_cuda(const ExpertFfnBackwardParams& params, Stream stream);
// Bytes of `workspace`.
std::int64_t mfx_grouped_gemm_cuda_workspace(const GroupedGemmParams& params);
std::int64_t mfx_grouped_gemm_backward_cuda_workspace(const GroupedGemmBackwardParams& params);
std::int64_t mfx_expert_ffn_cuda_workspace(const ExpertFfnParams& params);
std::int64_t mfx_expert_ffn_backward_cuda_workspace(const ExpertFfnBackwardParams& params);
}

}  // namespace mfx
