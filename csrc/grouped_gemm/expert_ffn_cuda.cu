// expert_ffn's launchers. Nothing but x and the pre-activation h is kept for backward: activation(h) is computed again
// on the way out of the product that gives its gradient, and serves the gradient of the down matrices.
#include "grouped_gemm/cuda_launches.hpp"

namespace mfx {
namespace {

using namespace grouped;

struct ForwardMemory {
  char* activated;
  float* rows = nullptr;
  std::int64_t bytes;

  explicit ForwardMemory(const ExpertFfnParams& p) {
    const std::int64_t row_elements = p.layout.num_slots() * element_size(p.dtype);
    Workspace memory(p.workspace);
    activated = memory.take<char>(row_elements * p.hidden_features);
    if (sums_choices(p.layout, RowOrder::kToken)) rows = memory.take<float>(p.layout.num_slots() * p.model_features);
    bytes = memory.bytes();
  }
};

std::int64_t up_columns(const ExpertFfnParams& p) {
  return p.activation.gated ? 2 * p.hidden_features : p.hidden_features;
}

struct BackwardMemory {
  char *grad_hidden, *gated = nullptr;
  float *dots = nullptr, *bias_dots = nullptr, *rows = nullptr;
  std::int64_t bytes;

  explicit BackwardMemory(const ExpertFfnBackwardParams& p) {
    const ExpertFfnParams& f = p.forward;
    const std::int64_t row_elements = f.layout.num_slots() * element_size(f.dtype);
    Workspace memory(p.workspace);
    grad_hidden = memory.take<char>(row_elements * up_columns(f));
    if (any(p.grad_down, f.layout.num_experts)) gated = memory.take<char>(row_elements * f.hidden_features);
    if (p.grad_gates != nullptr) {
      dots = memory.take<float>(num_dots(f.layout, f.hidden_features));
      if (f.down_bias != nullptr) bias_dots = memory.take<float>(f.layout.num_slots());
    }
    if (p.grad_x != nullptr && sums_choices(f.layout, RowOrder::kToken)) {
      rows = memory.take<float>(f.layout.num_slots() * f.model_features);
    }
    bytes = memory.bytes();
  }
};

}  // namespace

extern "C" {

std::int64_t mfx_expert_ffn_cuda_workspace(const ExpertFfnParams& params) {
  return ForwardMemory(params).bytes;
}

std::int64_t mfx_expert_ffn_backward_cuda_workspace(const ExpertFfnBackwardParams& params) {
  return BackwardMemory(params).bytes;
}

Status mfx_expert_ffn_cuda(const ExpertFfnParams& p, Stream stream) {
  const ForwardMemory memory(p);
  Launches launches(p.dtype, p.allow_tf32, p.layout, stream);
  const RowMap activated = launches.map(memory.activated, RowOrder::kExpert, p.hidden_features);

  RowProductParams up = {};
  up.rows = launches.map(p.x);
  up.depth = static_cast<std::int32_t>(p.model_features);
  up.columns = static_cast<std::int32_t>(p.hidden_features);
  up.matrices = launches.matrices(p.up, p.model_features, up_columns(p));
  up.activation = p.activation;
  up.bias = static_cast<const char*>(p.up_bias);
  up.hidden = static_cast<char*>(p.hidden);
  up.out = activated;
  launches.row_product(Product::kForward, up);

  RowProductParams down = {};
  down.rows = activated;
  down.depth = static_cast<std::int32_t>(p.hidden_features);
  down.columns = static_cast<std::int32_t>(p.model_features);
  down.matrices = launches.matrices(p.down, p.hidden_features, p.model_features);
  down.bias = static_cast<const char*>(p.down_bias);
  launches.write_to(&down, p.out, RowOrder::kToken, p.gates, memory.rows);
  launches.row_product(Product::kForward, down);
  launches.combine(memory.rows, p.gates, p.out, p.model_features);
  return launches.status();
}

Status mfx_expert_ffn_backward_cuda(const ExpertFfnBackwardParams& p, Stream stream) {
  const ExpertFfnParams& f = p.forward;
  const BackwardMemory memory(p);
  Launches launches(f.dtype, f.allow_tf32, f.layout, stream);
  const RowMap grad = launches.map(p.grad),
               grad_hidden = launches.map(memory.grad_hidden, RowOrder::kExpert, up_columns(f));

  RowProductParams through_down = {};
  through_down.rows = grad;
  through_down.depth = static_cast<std::int32_t>(f.model_features);
  through_down.columns = static_cast<std::int32_t>(f.hidden_features);
  through_down.matrices = launches.matrices(f.down, f.hidden_features, f.model_features);
  through_down.gates = static_cast<const float*>(f.gates);
  through_down.hidden_grad = {f.activation, through_down.columns, static_cast<const char*>(f.hidden),
                              memory.grad_hidden, memory.gated};
  through_down.dots = memory.dots;
  launches.bias_dots(grad, f.down_bias, memory.bias_dots, f.model_features);
  launches.row_product(Product::kHiddenGrad, through_down, p.grad_gates, memory.bias_dots);

  launches.bias_grad(grad, f.gates, p.grad_down_bias, f.model_features);
  launches.bias_grad(grad_hidden, nullptr, p.grad_up_bias, up_columns(f));
  if (any(p.grad_down, f.layout.num_experts)) {
    launches.weight_grad(launches.map(memory.gated, RowOrder::kExpert, f.hidden_features), grad, p.grad_down,
                         f.hidden_features, f.model_features);
  }
  if (any(p.grad_up, f.layout.num_experts)) {
    launches.weight_grad(launches.map(f.x), grad_hidden, p.grad_up, f.model_features, up_columns(f));
  }
  if (p.grad_x != nullptr) {
    RowProductParams through_up = {};
    through_up.rows = grad_hidden;
    through_up.depth = static_cast<std::int32_t>(up_columns(f));
    through_up.columns = static_cast<std::int32_t>(f.model_features);
    through_up.matrices = launches.matrices(f.up, f.model_features, up_columns(f));
    launches.write_to(&through_up, p.grad_x, RowOrder::kToken, nullptr, memory.rows);
    launches.row_product(Product::kInputGrad, through_up);
    launches.combine(memory.rows, nullptr, p.grad_x, f.model_features);
  }
  return launches.status();
}

}  // extern "C"

}  // namespace mfx
