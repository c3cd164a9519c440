#include "moduleformer_ext/grouped_gemm.hpp"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "grouped_gemm";

struct Args {
  at::Tensor x;
  std::vector<at::Tensor> weight;
  LayoutTensors layout;
  std::string x_order, out_order;
  OptionalTensor gates;
  std::optional<std::string> activation;

  RowOrder rows_of_x() const { return parse_order(kOp, "x_order", x_order); }
  RowOrder rows_of_out() const { return parse_order(kOp, "out_order", out_order); }
  ActivationSpec spec() const { return activation ? parse_activation(kOp, *activation) : ActivationSpec{}; }
  c10::SymInt in_features() const { return weight[0].sym_size(1); }
  c10::SymInt out_columns() const { return spec().gated ? weight[0].sym_size(2) / 2 : weight[0].sym_size(2); }
};
struct Needs {
  bool x, gates;
  c10::List<bool> weight;
};
using ForwardArgs = RoutedForwardArgs<Args>;
using BackwardArgs = RoutedBackwardArgs<Args, Needs>;

void check_arguments(const Args& a) {
  const RowOrder x_order = a.rows_of_x(), out_order = a.rows_of_out();
  const ActivationSpec activation = a.spec();
  check_float_dtype(kOp, "x", a.x);
  check_layout(kOp, a.layout, a.x);
  check_rows(kOp, "x", a.x, a.layout, x_order);
  check_segments(kOp, "weight", a.weight, a.layout, a.x);
  MFX_CHECK_ARG(a.x.sym_size(-1) == a.in_features(), kOp, "x",
                c10::str("have as many features as weight has rows (", a.in_features(), ")"), a.x.sym_size(-1));
  MFX_CHECK_ARG(!activation.gated || a.weight[0].sym_size(2) % 2 == 0, kOp, "weight",
                "have an even number of columns for a gated activation", a.weight[0].sym_size(2));
  if (a.gates) {
    check_gates(kOp, *a.gates, a.layout, a.x);
    MFX_CHECK_ARG(out_order == RowOrder::kToken, kOp, "out_order", "be 'token' where gates are given", "'", a.out_order,
                  "'");
  }
}

// Of the pre-activation, which is empty where there is none.
c10::SymDimVector hidden_shape(const Args& a, bool save) {
  if (!save || a.spec().function == Activation::kNone) return {0};
  return {a.layout.num_slots(), a.weight[0].sym_size(2)};
}

std::tuple<at::Tensor, at::Tensor> allocate(const Args& a, bool save_hidden) {
  return {empty_rows(rows_shape(a.layout, a.rows_of_out(), a.out_columns()), a.x.options()),
          empty_rows(hidden_shape(a, save_hidden), a.x.options())};
}

// Tensors that the parameters of a launch point into.
struct Operands {
  at::Tensor x, gates;
  std::vector<at::Tensor> weight;
  std::vector<void*> pointers;

  explicit Operands(const Args& a)
      : x(with_unit_stride(a.x)),
        gates(a.gates ? a.gates->contiguous() : at::Tensor()),
        weight(contiguous(a.weight)),
        pointers(expert_pointers(weight, weight)) {}

  GroupedGemmParams params(const Args& a, Backend backend) const {
    const DType dtype = check_float_dtype(kOp, "x", x);
    return {
        .dtype = dtype,
        .layout = a.layout.view(),
        .activation = a.spec(),
        .in_features = weight[0].size(1),
        .out_features = weight[0].size(2),
        .x = view_rows(x, a.rows_of_x()),
        .weight = pointers.data(),
        .gates = gates.defined() ? gates.const_data_ptr() : nullptr,
        .out_order = a.rows_of_out(),
        .out = nullptr,
        .hidden = nullptr,
        .allow_tf32 = allow_tf32(backend, dtype),
    };
  }
};

template <bool kMeta>
std::tuple<at::Tensor, at::Tensor> forward(const ForwardArgs& f) {
  const Args& a = f.args;
  check_arguments(a);
  auto outputs = allocate(a, f.save_hidden);
  if constexpr (kMeta) return outputs;
  auto& [out, hidden] = outputs;
  const Backend backend = backend_of(kOp, "x", a.x);
  const Operands operands(a);
  GroupedGemmParams params = operands.params(a, backend);
  params.out = out.mutable_data_ptr();
  params.hidden = data_or_null(hidden);
  launch(kOp, backend, {a.x, a.weight[0]}, params, grouped_gemm_cpu, MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda),
         MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda_workspace));
  return outputs;
}

// Of x, gates and the segments of weight.
std::vector<at::Tensor> allocate_gradients(const Args& a, const Needs& needs) {
  std::vector<at::Tensor> gradients{
      needs.x ? empty_rows(a.x.sym_sizes(), a.x.options()) : no_tensor(a.x),
      needs.gates && a.gates ? at::empty_symint(a.gates->sym_sizes(), a.gates->options()) : no_tensor(a.x)};
  add_gradients(gradients, kOp, "needs_weight", a.weight, needs.weight);
  return gradients;
}

void check_backward(const BackwardArgs& b) {
  const auto& [grad, a, hidden, needs] = b;
  check_arguments(a);
  check_grad(kOp, grad, a.layout, a.rows_of_out(), a.out_columns(), a.x);
  check_hidden(kOp, hidden, hidden_shape(a, /*save=*/true), a.x);
}

template <bool kMeta>
std::vector<at::Tensor> backward(const BackwardArgs& b) {
  check_backward(b);
  const auto& [grad, a, hidden, needs] = b;
  std::vector<at::Tensor> gradients = allocate_gradients(a, needs);
  if constexpr (kMeta) return gradients;
  const Backend backend = backend_of(kOp, "x", a.x);
  const Operands operands(a);
  const at::Tensor grad_rows = with_unit_stride(grad), saved = hidden.contiguous();
  GroupedGemmBackwardParams params{};
  params.forward = operands.params(a, backend);
  params.forward.hidden = data_or_null(saved);
  params.grad = view_rows(grad_rows, a.rows_of_out());
  params.grad_x = data_or_null(gradients[0]);
  params.grad_gates = data_or_null(gradients[1]);
  const auto pointers = expert_pointers(at::TensorList(gradients).slice(2), operands.weight);
  params.grad_weight = pointers.data();
  launch(kOp, backend, {a.x, a.weight[0]}, params, grouped_gemm_backward_cpu,
         MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda),
         MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda_workspace));
  return gradients;
}

struct GroupedGemm {
  using Args = mfx::Args;
  static constexpr const char* kOp = mfx::kOp;
  template <bool kMeta>
  static constexpr auto kernel_forward = &mfx::forward<kMeta>;
  template <bool kMeta>
  static constexpr auto kernel_backward = &mfx::backward<kMeta>;

  static auto inputs(const Args& a) { return tensor_list(a.x, a.gates, a.weight); }
  static auto forward(const Args& a, bool save_hidden) {
    return call<"grouped_gemm_forward", kernel_forward<false>>({a, save_hidden});
  }
  static auto backward(const at::Tensor& grad, const Args& a, const at::Tensor& hidden, const c10::List<bool>& needs) {
    return call<"grouped_gemm_backward", kernel_backward<false>>(
        {grad, a, hidden, {needs[0], needs[1], slice(needs, 2, needs.size())}});
  }
  // x and the matrices in the autocast type; gates stay float32, as the router made them.
  static at::Tensor autocast(Args a) {
    const Autocast cast(a.x);
    cast(a.x);
    cast(a.weight);
    if (a.gates) cast.cast(*a.gates, at::kFloat);
    return call<"grouped_gemm", &autocast>(a);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  // The backward op's results: gradients of x, gates and each segment; an empty tensor for those not needed.
  define<GroupedGemm>(
      m,
      "Tensor x, Tensor[] weight, Tensor offsets, Tensor slot_order, Tensor position, int num_choices, str x_order, "
      "str out_order, Tensor? gates, str? activation",
      "bool[] needs_weight");
}

}  // namespace mfx
