#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/autograd.hpp"
#include "bindings/launch.hpp"
#include "bindings/routed.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "expert_ffn";

struct Arguments {
  const at::Tensor& x;
  at::TensorList up, down;
  LayoutTensors layout;
  const at::Tensor& gates;
  ActivationSpec activation;

  c10::SymInt model_features() const { return up[0].sym_size(1); }
  c10::SymInt up_columns() const { return up[0].sym_size(2); }
};

Arguments check_arguments(const at::Tensor& x, at::TensorList up, at::TensorList down, const LayoutTensors& layout,
                          const at::Tensor& gates, c10::string_view activation) {
  const Arguments a{x, up, down, layout, gates, parse_activation(kOp, activation)};
  check_float_dtype(kOp, "x", x);
  check_layout(kOp, layout, x);
  check_rows(kOp, "x", x, layout, RowOrder::kToken);
  check_segments(kOp, "up", up, layout, x);
  check_segments(kOp, "down", down, layout, x);
  check_gates(kOp, gates, layout, x);
  MFX_CHECK_ARG(x.sym_size(-1) == a.model_features(), kOp, "x",
                c10::str("have as many features as up has rows (", a.model_features(), ")"), x.sym_size(-1));
  MFX_CHECK_ARG(!a.activation.gated || a.up_columns() % 2 == 0, kOp, "up",
                "have an even number of columns for a gated activation", a.up_columns());
  const c10::SymInt hidden = a.activation.gated ? a.up_columns() / 2 : a.up_columns();
  MFX_CHECK_ARG(down[0].sym_size(1) == hidden && down[0].sym_size(2) == a.model_features(), kOp, "down",
                c10::str("have shape [num_experts, ", hidden, ", ", a.model_features(), "] beside this up"), "shape ",
                down[0].sym_sizes());
  return a;
}

std::tuple<at::Tensor, at::Tensor> allocate(const Arguments& a, bool save_hidden) {
  return {empty_rows(a.x.sym_sizes(), a.x.options()),
          save_hidden ? empty_rows({a.layout.num_slots(), a.up_columns()}, a.x.options()) : no_tensor(a.x)};
}

// Tensors that the parameters of a launch point into.
struct Operands {
  at::Tensor x, gates;
  std::vector<at::Tensor> up, down;
  std::vector<void*> up_pointers, down_pointers;

  explicit Operands(const Arguments& a)
      : x(with_unit_stride(a.x)),
        gates(a.gates.contiguous()),
        up(contiguous(a.up)),
        down(contiguous(a.down)),
        up_pointers(expert_pointers(up, up)),
        down_pointers(expert_pointers(down, down)) {}

  ExpertFfnParams params(const Arguments& a, Backend backend) const {
    const DType dtype = check_float_dtype(kOp, "x", x);
    return {
        .dtype = dtype,
        .layout = a.layout.view(),
        .activation = a.activation,
        .model_features = x.size(1),
        .hidden_features = down[0].size(1),
        .x = view_rows(x, RowOrder::kToken),
        .up = up_pointers.data(),
        .down = down_pointers.data(),
        .gates = gates.const_data_ptr(),
        .out = nullptr,
        .hidden = nullptr,
        .allow_tf32 = allow_tf32(backend, dtype),
    };
  }
};

using Forward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, at::TensorList, at::TensorList, const at::Tensor&,
                                                   const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&,
                                                   c10::string_view, bool);

// Meta tensors get outputs and nothing else.
template <bool kMeta>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, at::TensorList up, at::TensorList down,
                                           const at::Tensor& offsets, const at::Tensor& slot_order,
                                           const at::Tensor& position, int64_t num_choices, const at::Tensor& gates,
                                           c10::string_view activation, bool save_hidden) {
  const LayoutTensors layout{offsets, slot_order, position, num_choices};
  const Arguments a = check_arguments(x, up, down, layout, gates, activation);
  auto outputs = allocate(a, save_hidden);
  if constexpr (!kMeta) {
    auto& [out, hidden] = outputs;
    const Backend backend = backend_of(kOp, "x", x);
    const Operands operands(a);
    ExpertFfnParams params = operands.params(a, backend);
    params.out = out.mutable_data_ptr();
    params.hidden = data_or_null(hidden);
    switch (backend) {
      case Backend::kCpu: check_status(kOp, expert_ffn_cpu(params)); break;
      case Backend::kCuda:
        launch_cuda(kOp, {x, up[0], down[0]}, params, MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda),
                    MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
        break;
    }
  }
  return outputs;
}

struct Needs {
  bool x, gates;
  const c10::List<bool>&up, &down;
};

// Gradients of x, gates, the segments of up and those of down.
std::vector<at::Tensor> allocate_gradients(const Arguments& a, const Needs& needs) {
  std::vector<at::Tensor> gradients{
      needs.x ? empty_rows(a.x.sym_sizes(), a.x.options()) : no_tensor(a.x),
      needs.gates ? at::empty_symint(a.gates.sym_sizes(), a.gates.options()) : no_tensor(a.x)};
  const auto add = [&](const char* argument, at::TensorList segments, const c10::List<bool>& wanted) {
    MFX_CHECK_ARG(wanted.size() == segments.size(), kOp, argument,
                  c10::str("have one entry per segment (", segments.size(), ")"), wanted.size());
    for (size_t i = 0; i < segments.size(); ++i) {
      gradients.push_back(wanted[i] ? empty_rows(segments[i].sym_sizes(), a.x.options()) : no_tensor(a.x));
    }
  };
  add("needs_up", a.up, needs.up);
  add("needs_down", a.down, needs.down);
  return gradients;
}

void check_backward(const Arguments& a, const at::Tensor& grad, const at::Tensor& hidden) {
  check_rows(kOp, "grad", grad, a.layout, RowOrder::kToken);
  check_same_dtype(kOp, "grad", grad, "x", a.x);
  check_same_device(kOp, "grad", grad, "x", a.x);
  MFX_CHECK_ARG(grad.sym_size(1) == a.model_features(), kOp, "grad",
                c10::str("have ", a.model_features(), " columns like the output"), grad.sym_size(1));
  check_hidden(kOp, hidden, {a.layout.num_slots(), a.up_columns()}, a.x);
}

using Backward = std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList,
                                         const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                         const at::Tensor&, c10::string_view, const at::Tensor&, bool, bool,
                                         c10::List<bool>, c10::List<bool>);

template <bool kMeta>
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, at::TensorList up, at::TensorList down,
                                 const at::Tensor& offsets, const at::Tensor& slot_order, const at::Tensor& position,
                                 int64_t num_choices, const at::Tensor& gates, c10::string_view activation,
                                 const at::Tensor& hidden, bool needs_x, bool needs_gates, c10::List<bool> needs_up,
                                 c10::List<bool> needs_down) {
  const LayoutTensors layout{offsets, slot_order, position, num_choices};
  const Arguments a = check_arguments(x, up, down, layout, gates, activation);
  check_backward(a, grad, hidden);
  std::vector<at::Tensor> gradients = allocate_gradients(a, {needs_x, needs_gates, needs_up, needs_down});
  if constexpr (!kMeta) {
    const Backend backend = backend_of(kOp, "x", x);
    const Operands operands(a);
    const at::Tensor grad_rows = with_unit_stride(grad), saved = hidden.contiguous();
    ExpertFfnBackwardParams params{};
    params.forward = operands.params(a, backend);
    params.forward.hidden = data_or_null(saved);
    params.grad = view_rows(grad_rows, RowOrder::kToken);
    params.grad_x = data_or_null(gradients[0]);
    params.grad_gates = data_or_null(gradients[1]);
    const at::TensorList all(gradients);
    const auto up_pointers = expert_pointers(all.slice(2, up.size()), operands.up);
    const auto down_pointers = expert_pointers(all.slice(2 + up.size()), operands.down);
    params.grad_up = up_pointers.data();
    params.grad_down = down_pointers.data();
    switch (backend) {
      case Backend::kCpu: check_status(kOp, expert_ffn_backward_cpu(params)); break;
      case Backend::kCuda:
        launch_cuda(kOp, {x, up[0], down[0]}, params, MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda),
                    MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda_workspace));
        break;
    }
  }
  return gradients;
}

const c10::TypedOperatorHandle<Forward>& forward_op() {
  static const auto op = find_op<Forward>("moduleformer_ext::expert_ffn_forward");
  return op;
}
const c10::TypedOperatorHandle<Backward>& backward_op() {
  static const auto op = find_op<Backward>("moduleformer_ext::expert_ffn_backward");
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ExpertFfn : public torch::autograd::Function<ExpertFfn> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList up, at::TensorList down,
                            const at::Tensor& offsets, const at::Tensor& slot_order, const at::Tensor& position,
                            int64_t num_choices, const at::Tensor& gates, const std::string& activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, hidden] =
        forward_op().call(x, up, down, offsets, slot_order, position, num_choices, gates, activation, true);
    variable_list saved{x, offsets, slot_order, position, gates, hidden};
    saved.insert(saved.end(), up.begin(), up.end());
    saved.insert(saved.end(), down.begin(), down.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["num_choices"] = num_choices;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["up_segments"] = static_cast<int64_t>(up.size());
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList matrices = at::TensorList(saved).slice(6);
    const size_t segments = matrices.size();
    const size_t up_segments = static_cast<size_t>(ctx->saved_data["up_segments"].toInt());
    c10::List<bool> needs_up, needs_down;
    for (size_t i = 0; i < segments; ++i) {
      (i < up_segments ? needs_up : needs_down).push_back(ctx->needs_input_grad(1 + i));
    }
    // Inputs in order: x, the segments of up and down, three tensors of the layout, num_choices, gates, activation;
    // needs_input_grad counts tensors alone.
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_gates = ctx->needs_input_grad(1 + segments + 3);
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const auto gradients =
        backward_op().call(grads[0], saved[0], matrices.slice(0, up_segments), matrices.slice(up_segments), saved[1],
                           saved[2], saved[3], ctx->saved_data["num_choices"].toInt(), saved[4], activation, saved[5],
                           needs_x, needs_gates, needs_up, needs_down);
    const size_t gates_index = 1 + segments + 4;
    variable_list result(gates_index + 2);
    result[0] = gradient_or_undefined(needs_x, gradients[0]);
    for (size_t i = 0; i < segments; ++i) {
      result[1 + i] = gradient_or_undefined(ctx->needs_input_grad(1 + i), gradients[2 + i]);
    }
    result[gates_index] = gradient_or_undefined(needs_gates, gradients[1]);
    return result;
  }
};

at::Tensor below_autograd(const at::Tensor& x, at::TensorList up, at::TensorList down, const at::Tensor& offsets,
                          const at::Tensor& slot_order, const at::Tensor& position, int64_t num_choices,
                          const at::Tensor& gates, c10::string_view activation) {
  return std::get<0>(
      forward_op().call(x, up, down, offsets, slot_order, position, num_choices, gates, activation, false));
}

at::Tensor autograd(const at::Tensor& x, at::TensorList up, at::TensorList down, const at::Tensor& offsets,
                    const at::Tensor& slot_order, const at::Tensor& position, int64_t num_choices,
                    const at::Tensor& gates, c10::string_view activation) {
  refuse_forward_mode(kOp, x, up, down, gates);
  if (records_grad(x, up, down, gates)) {
    return ExpertFfn::apply(x, up, down, offsets, slot_order, position, num_choices, gates, std::string(activation));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return below_autograd(x, up, down, offsets, slot_order, position, num_choices, gates, activation);
}

template <c10::DeviceType kDevice>
at::Tensor autocast(const at::Tensor& x, at::TensorList up, at::TensorList down, const at::Tensor& offsets,
                    const at::Tensor& slot_order, const at::Tensor& position, int64_t num_choices,
                    const at::Tensor& gates, c10::string_view activation) {
  static const auto op = find_op<decltype(below_autograd)>("moduleformer_ext::expert_ffn");
  c10::impl::ExcludeDispatchKeyGuard guard(
      c10::DispatchKeySet({at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)}));
  const AutocastOperands cast(kDevice);
  return op.call(cast.lower(x), cast.lower(up), cast.lower(down), offsets, slot_order, position, num_choices,
                 cast.gates(gates), activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "expert_ffn(Tensor x, Tensor[] up, Tensor[] down, Tensor offsets, Tensor slot_order, Tensor position, int "
      "num_choices, Tensor gates, str activation) -> Tensor",
      tags);
  m.def(
      "expert_ffn_forward(Tensor x, Tensor[] up, Tensor[] down, Tensor offsets, Tensor slot_order, Tensor position, "
      "int "
      "num_choices, Tensor gates, str activation, bool save_hidden) -> (Tensor out, Tensor hidden)",
      tags);
  // Gradients of x, gates and each segment of up, then of down; an empty tensor for those not needed.
  m.def(
      "expert_ffn_backward(Tensor grad, Tensor x, Tensor[] up, Tensor[] down, Tensor offsets, Tensor slot_order, "
      "Tensor "
      "position, int num_choices, Tensor gates, str activation, Tensor hidden, bool needs_x, bool needs_gates, bool[] "
      "needs_up, bool[] needs_down) -> Tensor[]",
      tags);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CPU, m) {
  m.impl("expert_ffn", &below_autograd);
  m.impl("expert_ffn_forward", &forward<false>);
  m.impl("expert_ffn_backward", &backward<false>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CUDA, m) {
  m.impl("expert_ffn", &below_autograd);
  m.impl("expert_ffn_forward", &forward<false>);
  m.impl("expert_ffn_backward", &backward<false>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Meta, m) {
  m.impl("expert_ffn", &below_autograd);
  m.impl("expert_ffn_forward", &forward<true>);
  m.impl("expert_ffn_backward", &backward<true>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Autograd, m) {
  m.impl("expert_ffn", &autograd);
  m.impl("expert_ffn_forward", not_differentiable());
  m.impl("expert_ffn_backward", not_differentiable());
}
TORCH_LIBRARY_IMPL(moduleformer_ext, AutocastCPU, m) {
  m.impl("expert_ffn", &autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, AutocastCUDA, m) {
  m.impl("expert_ffn", &autocast<c10::kCUDA>);
}

}  // namespace mfx
