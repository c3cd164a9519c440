// Matrices of experts as the steps of layers take them, and the product with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "bindings/launch.hpp"
#include "bindings/quantised.hpp"
#include "bindings/routed.hpp"

namespace mfx {

// Floating-point segments, or numbers and scales beside bits, in_features and out_features.
struct ExpertWeight {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> format;  // empty for segments

  bool is_quantised() const { return !format.empty(); }
  QuantisedWeight quantised() const { return {tensors[0], tensors[1], format[0], format[1], format[2]}; }
  ExpertShape shape() const {
    if (is_quantised()) return {format[1], format[2]};
    return {tensors[0].sym_size(1), tensors[0].sym_size(2)};
  }

  void check(const char* op, const char* argument, const c10::SymInt& experts, const at::Tensor& x) const {
    if (!is_quantised()) {
      check_segments(op, argument, tensors, experts, "the gate", x);
      return;
    }
    MFX_CHECK_ARG(tensors.size() == 2 && format.size() == 3, op, argument,
                  "be numbers and scales beside bits, in_features and out_features where it is quantised",
                  tensors.size(), " tensors beside ", format.size(), " integers");
    quantised().check(op, argument, experts, x);
  }
  void check_runnable(const char* op, const char* argument, const at::Tensor& x) const {
    if (is_quantised()) quantised().check_runnable(op, argument, x);
  }
};

// What is multiplied, and where to.
struct ExpertProduct {
  ActivationSpec activation;
  RoutedRows rows;
  RowOrder out_order;
  const void* gates;
  void* out;
};

// Rows like x, of all slots in one order, by the matrices of their experts: grouped_gemm or quantised_gemm.
inline void multiply(const char* op, Backend backend, const at::Tensor& x, const RoutedLayout& layout,
                     const ExpertWeight& weight, const ExpertProduct& product) {
  const DType dtype = check_float_dtype(op, "x", x);
  if (weight.is_quantised()) {
    const QuantisedWeight quantised = weight.quantised();
    const QuantisedGemmParams params = {
        .dtype = dtype,
        .layout = layout,
        .activation = product.activation,
        .in_features = quantised.in_features,
        .out_features = quantised.out_features,
        .x = product.rows,
        .weight = quantised.view(),
        .gates = product.gates,
        .out_order = product.out_order,
        .out = product.out,
    };
    launch(op, backend, {x, quantised.values}, params, quantised_gemm_cpu, MFX_CUDA_FUNCTION(mfx_quantised_gemm_cuda),
           MFX_CUDA_FUNCTION(mfx_quantised_gemm_cuda_workspace));
    return;
  }
  const MatrixOperand matrices(weight.tensors);
  const GroupedGemmParams params = {
      .dtype = dtype,
      .layout = layout,
      .activation = product.activation,
      .in_features = matrices.rows(),
      .out_features = matrices.columns(),
      .x = product.rows,
      .weight = matrices.view(),
      .bias = nullptr,
      .gates = product.gates,
      .out_order = product.out_order,
      .out = product.out,
      .hidden = nullptr,
      .allow_tf32 = allow_tf32(backend, dtype),
  };
  launch(op, backend, {x, weight.tensors[0]}, params, grouped_gemm_cpu, MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda),
         MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda_workspace));
}

}  // namespace mfx
