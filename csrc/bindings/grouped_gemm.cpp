#include "moduleformer_ext/grouped_gemm.hpp"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "bindings/autograd.hpp"
#include "bindings/launch.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "grouped_gemm";
using OptionalName = std::optional<c10::string_view>;

// The arguments all entry points have in common.
struct Arguments {
  const at::Tensor& x;
  at::TensorList weight;
  LayoutTensors layout;
  RowOrder x_order, out_order;
  const OptionalTensor& gates;
  ActivationSpec activation;

  c10::SymInt in_features() const { return weight[0].sym_size(1); }
  c10::SymInt out_columns() const { return activation.gated ? weight[0].sym_size(2) / 2 : weight[0].sym_size(2); }
};

Arguments check_arguments(const at::Tensor& x, at::TensorList weight, const LayoutTensors& layout,
                          c10::string_view x_order, c10::string_view out_order, const OptionalTensor& gates,
                          const OptionalName& activation) {
  const Arguments a{x,
                    weight,
                    layout,
                    parse_order(kOp, "x_order", x_order),
                    parse_order(kOp, "out_order", out_order),
                    gates,
                    activation ? parse_activation(kOp, *activation) : ActivationSpec{}};
  check_float_dtype(kOp, "x", x);
  check_layout(kOp, layout, x);
  check_rows(kOp, "x", x, layout, a.x_order);
  check_segments(kOp, "weight", weight, layout, x);
  MFX_CHECK_ARG(x.sym_size(-1) == a.in_features(), kOp, "x",
                c10::str("have as many features as weight has rows (", a.in_features(), ")"), x.sym_size(-1));
  MFX_CHECK_ARG(!a.activation.gated || weight[0].sym_size(2) % 2 == 0, kOp, "weight",
                "have an even number of columns for a gated activation", weight[0].sym_size(2));
  if (gates) {
    check_gates(kOp, *gates, layout, x);
    MFX_CHECK_ARG(a.out_order == RowOrder::kToken, kOp, "out_order", "be 'token' where gates are given", "'", out_order,
                  "'");
  }
  return a;
}

// Of the pre-activation, which is empty where there is none.
c10::SymDimVector hidden_shape(const Arguments& a, bool save) {
  if (!save || a.activation.function == Activation::kNone) return {0};
  return {a.layout.num_slots(), a.weight[0].sym_size(2)};
}

std::tuple<at::Tensor, at::Tensor> allocate(const Arguments& a, bool save_hidden) {
  return {empty_rows(rows_shape(a.layout, a.out_order, a.out_columns()), a.x.options()),
          empty_rows(hidden_shape(a, save_hidden), a.x.options())};
}

// Tensors that the parameters of a launch point into.
struct Operands {
  at::Tensor x, gates;
  std::vector<at::Tensor> weight;
  std::vector<void*> pointers;

  explicit Operands(const Arguments& a)
      : x(with_unit_stride(a.x)),
        gates(a.gates ? a.gates->contiguous() : at::Tensor()),
        weight(contiguous(a.weight)),
        pointers(expert_pointers(weight, weight)) {}

  GroupedGemmParams params(const Arguments& a, Backend backend) const {
    const DType dtype = check_float_dtype(kOp, "x", x);
    return {
        .dtype = dtype,
        .layout = a.layout.view(),
        .activation = a.activation,
        .in_features = weight[0].size(1),
        .out_features = weight[0].size(2),
        .x = view_rows(x, a.x_order),
        .weight = pointers.data(),
        .gates = gates.defined() ? gates.const_data_ptr() : nullptr,
        .out_order = a.out_order,
        .out = nullptr,
        .hidden = nullptr,
        .allow_tf32 = allow_tf32(backend, dtype),
    };
  }
};

using Forward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, at::TensorList, const at::Tensor&,
                                                   const at::Tensor&, const at::Tensor&, int64_t, c10::string_view,
                                                   c10::string_view, const OptionalTensor&, OptionalName, bool);

// Meta tensors get outputs and nothing else.
template <bool kMeta>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, at::TensorList weight, const at::Tensor& offsets,
                                           const at::Tensor& slot_order, const at::Tensor& position,
                                           int64_t num_choices, c10::string_view x_order, c10::string_view out_order,
                                           const OptionalTensor& gates, OptionalName activation, bool save_hidden) {
  const LayoutTensors layout{offsets, slot_order, position, num_choices};
  const Arguments a = check_arguments(x, weight, layout, x_order, out_order, gates, activation);
  auto outputs = allocate(a, save_hidden);
  if constexpr (!kMeta) {
    auto& [out, hidden] = outputs;
    const Backend backend = backend_of(kOp, "x", x);
    const Operands operands(a);
    GroupedGemmParams params = operands.params(a, backend);
    params.out = out.mutable_data_ptr();
    params.hidden = data_or_null(hidden);
    switch (backend) {
      case Backend::kCpu: check_status(kOp, grouped_gemm_cpu(params)); break;
      case Backend::kCuda:
        launch_cuda(kOp, {x, weight[0]}, params, MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda),
                    MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda_workspace));
        break;
    }
  }
  return outputs;
}

struct Needs {
  bool x, gates;
  const c10::List<bool>& weight;
};

std::vector<at::Tensor> allocate_gradients(const Arguments& a, const Needs& needs) {
  MFX_CHECK_ARG(needs.weight.size() == a.weight.size(), kOp, "needs_weight",
                c10::str("have one entry per segment (", a.weight.size(), ")"), needs.weight.size());
  std::vector<at::Tensor> gradients{
      needs.x ? empty_rows(rows_shape(a.layout, a.x_order, a.in_features()), a.x.options()) : no_tensor(a.x),
      needs.gates && a.gates ? at::empty_symint(a.gates->sym_sizes(), a.gates->options()) : no_tensor(a.x)};
  for (size_t i = 0; i < a.weight.size(); ++i) {
    gradients.push_back(needs.weight[i] ? empty_rows(a.weight[i].sym_sizes(), a.x.options()) : no_tensor(a.x));
  }
  return gradients;
}

void check_backward(const Arguments& a, const at::Tensor& grad, const at::Tensor& hidden) {
  check_rows(kOp, "grad", grad, a.layout, a.out_order);
  check_same_dtype(kOp, "grad", grad, "x", a.x);
  check_same_device(kOp, "grad", grad, "x", a.x);
  MFX_CHECK_ARG(grad.sym_size(-1) == a.out_columns(), kOp, "grad",
                c10::str("have ", a.out_columns(), " columns like the output"), grad.sym_size(-1));
  check_hidden(kOp, hidden, hidden_shape(a, /*save=*/true), a.x);
}

using Backward = std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&, at::TensorList, const at::Tensor&,
                                         const at::Tensor&, const at::Tensor&, int64_t, c10::string_view,
                                         c10::string_view, const OptionalTensor&, OptionalName, const at::Tensor&, bool,
                                         bool, c10::List<bool>);

template <bool kMeta>
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, at::TensorList weight,
                                 const at::Tensor& offsets, const at::Tensor& slot_order, const at::Tensor& position,
                                 int64_t num_choices, c10::string_view x_order, c10::string_view out_order,
                                 const OptionalTensor& gates, OptionalName activation, const at::Tensor& hidden,
                                 bool needs_x, bool needs_gates, c10::List<bool> needs_weight) {
  const LayoutTensors layout{offsets, slot_order, position, num_choices};
  const Arguments a = check_arguments(x, weight, layout, x_order, out_order, gates, activation);
  check_backward(a, grad, hidden);
  std::vector<at::Tensor> gradients = allocate_gradients(a, {needs_x, needs_gates, needs_weight});
  if constexpr (!kMeta) {
    const Backend backend = backend_of(kOp, "x", x);
    const Operands operands(a);
    const at::Tensor grad_rows = with_unit_stride(grad), saved = hidden.contiguous();
    GroupedGemmBackwardParams params{};
    params.forward = operands.params(a, backend);
    params.forward.hidden = data_or_null(saved);
    params.grad = view_rows(grad_rows, a.out_order);
    params.grad_x = data_or_null(gradients[0]);
    params.grad_gates = data_or_null(gradients[1]);
    const auto pointers = expert_pointers(at::TensorList(gradients).slice(2), operands.weight);
    params.grad_weight = pointers.data();
    switch (backend) {
      case Backend::kCpu: check_status(kOp, grouped_gemm_backward_cpu(params)); break;
      case Backend::kCuda:
        launch_cuda(kOp, {x, weight[0]}, params, MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda),
                    MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda_workspace));
        break;
    }
  }
  return gradients;
}

const c10::TypedOperatorHandle<Forward>& forward_op() {
  static const auto op = find_op<Forward>("moduleformer_ext::grouped_gemm_forward");
  return op;
}
const c10::TypedOperatorHandle<Backward>& backward_op() {
  static const auto op = find_op<Backward>("moduleformer_ext::grouped_gemm_backward");
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class GroupedGemm : public torch::autograd::Function<GroupedGemm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weight, const at::Tensor& offsets,
                            const at::Tensor& slot_order, const at::Tensor& position, int64_t num_choices,
                            const std::string& x_order, const std::string& out_order, const OptionalTensor& gates,
                            const std::optional<std::string>& activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, hidden] = forward_op().call(x, weight, offsets, slot_order, position, num_choices, x_order, out_order,
                                           gates, activation, true);
    variable_list saved{x, offsets, slot_order, position, gates ? *gates : at::Tensor(), hidden};
    saved.insert(saved.end(), weight.begin(), weight.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["num_choices"] = num_choices;
    ctx->saved_data["x_order"] = x_order;
    ctx->saved_data["out_order"] = out_order;
    ctx->saved_data["activation"] = activation;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList weight = at::TensorList(saved).slice(6);
    const size_t segments = weight.size();
    const OptionalTensor gates = saved[4].defined() ? OptionalTensor(saved[4]) : std::nullopt;
    // Inputs in order: x, the segments, three of the layout, num_choices, two orders, gates, activation.
    const size_t first_of_layout = 1 + segments, gates_index = first_of_layout + 6;
    c10::List<bool> needs_weight;
    for (size_t i = 0; i < segments; ++i) needs_weight.push_back(ctx->needs_input_grad(1 + i));
    // needs_input_grad counts tensors alone.
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_gates = gates && ctx->needs_input_grad(first_of_layout + 3);
    const auto activation = ctx->saved_data["activation"].toOptional<std::string>();
    const std::string x_order = ctx->saved_data["x_order"].toStringRef();
    const std::string out_order = ctx->saved_data["out_order"].toStringRef();
    const auto gradients = backward_op().call(grads[0], saved[0], weight, saved[1], saved[2], saved[3],
                                              ctx->saved_data["num_choices"].toInt(), x_order, out_order, gates,
                                              activation, saved[5], needs_x, needs_gates, needs_weight);
    variable_list result(gates_index + 2);
    result[0] = gradient_or_undefined(needs_x, gradients[0]);
    for (size_t i = 0; i < segments; ++i) result[1 + i] = gradient_or_undefined(needs_weight[i], gradients[2 + i]);
    result[gates_index] = gradient_or_undefined(needs_gates, gradients[1]);
    return result;
  }
};

at::Tensor below_autograd(const at::Tensor& x, at::TensorList weight, const at::Tensor& offsets,
                          const at::Tensor& slot_order, const at::Tensor& position, int64_t num_choices,
                          c10::string_view x_order, c10::string_view out_order, const OptionalTensor& gates,
                          OptionalName activation) {
  return std::get<0>(forward_op().call(x, weight, offsets, slot_order, position, num_choices, x_order, out_order, gates,
                                       activation, false));
}

at::Tensor autograd(const at::Tensor& x, at::TensorList weight, const at::Tensor& offsets, const at::Tensor& slot_order,
                    const at::Tensor& position, int64_t num_choices, c10::string_view x_order,
                    c10::string_view out_order, const OptionalTensor& gates, OptionalName activation) {
  refuse_forward_mode(kOp, x, weight, gates);
  if (records_grad(x, weight, gates)) {
    return GroupedGemm::apply(x, weight, offsets, slot_order, position, num_choices, std::string(x_order),
                              std::string(out_order), gates,
                              activation ? std::optional<std::string>(*activation) : std::nullopt);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return below_autograd(x, weight, offsets, slot_order, position, num_choices, x_order, out_order, gates, activation);
}

template <c10::DeviceType kDevice>
at::Tensor autocast(const at::Tensor& x, at::TensorList weight, const at::Tensor& offsets, const at::Tensor& slot_order,
                    const at::Tensor& position, int64_t num_choices, c10::string_view x_order,
                    c10::string_view out_order, const OptionalTensor& gates, OptionalName activation) {
  static const auto op = find_op<decltype(below_autograd)>("moduleformer_ext::grouped_gemm");
  c10::impl::ExcludeDispatchKeyGuard guard(
      c10::DispatchKeySet({at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)}));
  const AutocastOperands cast(kDevice);
  return op.call(cast.lower(x), cast.lower(weight), offsets, slot_order, position, num_choices, x_order, out_order,
                 gates ? OptionalTensor(cast.gates(*gates)) : gates, activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "grouped_gemm(Tensor x, Tensor[] weight, Tensor offsets, Tensor slot_order, Tensor position, int num_choices, "
      "str "
      "x_order, str out_order, Tensor? gates, str? activation) -> Tensor",
      tags);
  m.def(
      "grouped_gemm_forward(Tensor x, Tensor[] weight, Tensor offsets, Tensor slot_order, Tensor position, int "
      "num_choices, str x_order, str out_order, Tensor? gates, str? activation, bool save_hidden) -> (Tensor out, "
      "Tensor hidden)",
      tags);
  // Gradients of x, gates and each segment; an empty tensor for those not needed.
  m.def(
      "grouped_gemm_backward(Tensor grad, Tensor x, Tensor[] weight, Tensor offsets, Tensor slot_order, Tensor "
      "position, "
      "int num_choices, str x_order, str out_order, Tensor? gates, str? activation, Tensor hidden, bool needs_x, bool "
      "needs_gates, bool[] needs_weight) -> Tensor[]",
      tags);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CPU, m) {
  m.impl("grouped_gemm", &below_autograd);
  m.impl("grouped_gemm_forward", &forward<false>);
  m.impl("grouped_gemm_backward", &backward<false>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CUDA, m) {
  m.impl("grouped_gemm", &below_autograd);
  m.impl("grouped_gemm_forward", &forward<false>);
  m.impl("grouped_gemm_backward", &backward<false>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Meta, m) {
  m.impl("grouped_gemm", &below_autograd);
  m.impl("grouped_gemm_forward", &forward<true>);
  m.impl("grouped_gemm_backward", &backward<true>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Autograd, m) {
  m.impl("grouped_gemm", &autograd);
  m.impl("grouped_gemm_forward", not_differentiable());
  m.impl("grouped_gemm_backward", not_differentiable());
}
TORCH_LIBRARY_IMPL(moduleformer_ext, AutocastCPU, m) {
  m.impl("grouped_gemm", &autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, AutocastCUDA, m) {
  m.impl("grouped_gemm", &autocast<c10::kCUDA>);
}

}  // namespace mfx
