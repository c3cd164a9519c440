// grouped_gemm's launchers: the products and pointwise steps, in the order in which they depend on each other.
#include "grouped_gemm/cuda_launches.hpp"

namespace mfx {
namespace {

using namespace grouped;

std::int64_t output_columns(const GroupedGemmParams& p) {
  return p.activation.gated ? p.out_features / 2 : p.out_features;
}

struct ForwardMemory {
  float* rows = nullptr;  // before a token's are summed
  std::int64_t bytes;

  explicit ForwardMemory(const GroupedGemmParams& p) {
    Workspace memory(p.workspace);
    if (sums_choices(p.layout, p.out_order)) {
      rows = memory.take<float>(p.layout.num_slots() * output_columns(p));
    }
    bytes = memory.bytes();
  }
};

struct BackwardMemory {
  char *grad_hidden = nullptr, *scaled = nullptr;
  float *dots = nullptr, *bias_dots = nullptr, *rows = nullptr;
  std::int64_t bytes;

  explicit BackwardMemory(const GroupedGemmBackwardParams& p) {
    const GroupedGemmParams& f = p.forward;
    const std::int64_t row_elements = f.layout.num_slots() * element_size(f.dtype);
    const bool activated = f.activation.function != Activation::kNone;
    Workspace memory(p.workspace);
    if (activated) grad_hidden = memory.take<char>(row_elements * f.out_features);
    if (!activated && p.grad_gates != nullptr) {
      dots = memory.take<float>(num_dots(f.layout, f.in_features));
      if (f.bias != nullptr) bias_dots = memory.take<float>(f.layout.num_slots());
    }
    if (p.grad_x != nullptr && sums_choices(f.layout, f.x.order))
      rows = memory.take<float>(f.layout.num_slots() * f.in_features);
    if (!activated && f.gates != nullptr && any(p.grad_weight, f.layout.num_experts)) {
      scaled = memory.take<char>(row_elements * f.in_features);
    }
    bytes = memory.bytes();
  }
};

}  // namespace

extern "C" {

std::int64_t mfx_grouped_gemm_cuda_workspace(const GroupedGemmParams& params) {
  return ForwardMemory(params).bytes;
}

std::int64_t mfx_grouped_gemm_backward_cuda_workspace(const GroupedGemmBackwardParams& params) {
  return BackwardMemory(params).bytes;
}

Status mfx_grouped_gemm_cuda(const GroupedGemmParams& p, Stream stream) {
  const ForwardMemory memory(p);
  Launches launches(p.dtype, p.allow_tf32, p.layout, stream);
  const std::int64_t columns = output_columns(p);
  RowProductParams product = {};
  product.rows = launches.map(p.x);
  product.depth = static_cast<std::int32_t>(p.in_features);
  product.columns = static_cast<std::int32_t>(columns);
  product.matrices = launches.matrices(p.weight, p.in_features, p.out_features);
  product.activation = p.activation;
  product.bias = static_cast<const char*>(p.bias);
  product.hidden = static_cast<char*>(p.hidden);
  launches.write_to(&product, p.out, p.out_order, p.gates, memory.rows);
  launches.row_product(Product::kForward, product);
  launches.combine(memory.rows, p.gates, p.out, columns);
  return launches.status();
}

Status mfx_grouped_gemm_backward_cuda(const GroupedGemmBackwardParams& p, Stream stream) {
  const GroupedGemmParams& f = p.forward;
  const BackwardMemory memory(p);
  Launches launches(f.dtype, f.allow_tf32, f.layout, stream);

  // With an activation the gate is folded into the gradient of the pre-activation; without, into the results.
  const bool activated = f.activation.function != Activation::kNone;
  RowMap grad = launches.map(p.grad);
  if (activated) {
    const ActivationGradRows rows{f.activation, static_cast<std::int32_t>(output_columns(f)),
                                  static_cast<const char*>(f.hidden), memory.grad_hidden, nullptr};
    launches.activation_grad(rows, grad, f.gates, p.grad_gates);
    grad = launches.map(memory.grad_hidden, RowOrder::kExpert, f.out_features);
  }
  const RowMap x = launches.map(f.x);
  const void* const gates = activated ? nullptr : f.gates;
  if (p.grad_x != nullptr || memory.dots != nullptr) {
    RowProductParams product = {};
    product.rows = grad;
    product.depth = static_cast<std::int32_t>(f.out_features);
    product.columns = static_cast<std::int32_t>(f.in_features);
    product.matrices = launches.matrices(f.weight, f.in_features, f.out_features);
    if (p.grad_x != nullptr) launches.write_to(&product, p.grad_x, f.x.order, gates, memory.rows);
    if (memory.dots != nullptr) {
      product.x = x;
      product.dots = memory.dots;
    }
    launches.bias_dots(grad, f.bias, memory.bias_dots, f.out_features);
    launches.row_product(Product::kInputGrad, product, memory.dots != nullptr ? p.grad_gates : nullptr,
                         memory.bias_dots);
    launches.combine(memory.rows, gates, p.grad_x, f.in_features);
  }
  launches.bias_grad(grad, gates, p.grad_bias, f.out_features);
  if (any(p.grad_weight, f.layout.num_experts)) {
    RowMap left = x;
    if (memory.scaled != nullptr) {
      launches.scale(x, f.gates, memory.scaled, f.in_features);
      left = launches.map(memory.scaled, RowOrder::kExpert, f.in_features);
    }
    launches.weight_grad(left, grad, p.grad_weight, f.in_features, f.out_features);
  }
  return launches.status();
}

}  // extern "C"

}  // namespace mfx
