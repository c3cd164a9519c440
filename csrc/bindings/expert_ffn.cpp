#include <string>
#include <tuple>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "expert_ffn";

struct Args {
  at::Tensor x;
  std::vector<at::Tensor> up, down;
  LayoutTensors layout;
  at::Tensor gates;
  std::string activation;

  ActivationSpec spec() const { return parse_activation(kOp, activation); }
  c10::SymInt model_features() const { return up[0].sym_size(1); }
  c10::SymInt up_columns() const { return up[0].sym_size(2); }
};
struct Needs {
  bool x, gates;
  c10::List<bool> up, down;
};
using ForwardArgs = RoutedForwardArgs<Args>;
using BackwardArgs = RoutedBackwardArgs<Args, Needs>;

void check_arguments(const Args& a) {
  const bool gated = a.spec().gated;
  check_float_dtype(kOp, "x", a.x);
  check_layout(kOp, a.layout, a.x);
  check_rows(kOp, "x", a.x, a.layout, RowOrder::kToken);
  check_segments(kOp, "up", a.up, a.layout, a.x);
  check_segments(kOp, "down", a.down, a.layout, a.x);
  check_gates(kOp, a.gates, a.layout, a.x);
  MFX_CHECK_ARG(a.x.sym_size(-1) == a.model_features(), kOp, "x",
                c10::str("have as many features as up has rows (", a.model_features(), ")"), a.x.sym_size(-1));
  MFX_CHECK_ARG(!gated || a.up_columns() % 2 == 0, kOp, "up", "have an even number of columns for a gated activation",
                a.up_columns());
  const c10::SymInt hidden = gated ? a.up_columns() / 2 : a.up_columns();
  MFX_CHECK_ARG(a.down[0].sym_size(1) == hidden && a.down[0].sym_size(2) == a.model_features(), kOp, "down",
                c10::str("have shape [num_experts, ", hidden, ", ", a.model_features(), "] beside this up"), "shape ",
                a.down[0].sym_sizes());
}

std::tuple<at::Tensor, at::Tensor> allocate(const Args& a, bool save_hidden) {
  return {empty_rows(a.x.sym_sizes(), a.x.options()),
          save_hidden ? empty_rows({a.layout.num_slots(), a.up_columns()}, a.x.options()) : no_tensor(a.x)};
}

// Tensors that the parameters of a launch point into.
struct Operands {
  at::Tensor x, gates;
  std::vector<at::Tensor> up, down;
  std::vector<void*> up_pointers, down_pointers;

  explicit Operands(const Args& a)
      : x(with_unit_stride(a.x)),
        gates(a.gates.contiguous()),
        up(contiguous(a.up)),
        down(contiguous(a.down)),
        up_pointers(expert_pointers(up, up)),
        down_pointers(expert_pointers(down, down)) {}

  ExpertFfnParams params(const Args& a, Backend backend) const {
    const DType dtype = check_float_dtype(kOp, "x", x);
    return {
        .dtype = dtype,
        .layout = a.layout.view(),
        .activation = a.spec(),
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

template <bool kMeta>
std::tuple<at::Tensor, at::Tensor> forward(const ForwardArgs& f) {
  const Args& a = f.args;
  check_arguments(a);
  auto outputs = allocate(a, f.save_hidden);
  if constexpr (kMeta) return outputs;
  auto& [out, hidden] = outputs;
  const Backend backend = backend_of(kOp, "x", a.x);
  const Operands operands(a);
  ExpertFfnParams params = operands.params(a, backend);
  params.out = out.mutable_data_ptr();
  params.hidden = data_or_null(hidden);
  launch(kOp, backend, {a.x, a.up[0], a.down[0]}, params, expert_ffn_cpu, MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda),
         MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
  return outputs;
}

// Of x, gates, the segments of up and those of down.
std::vector<at::Tensor> allocate_gradients(const Args& a, const Needs& needs) {
  std::vector<at::Tensor> gradients{
      needs.x ? empty_rows(a.x.sym_sizes(), a.x.options()) : no_tensor(a.x),
      needs.gates ? at::empty_symint(a.gates.sym_sizes(), a.gates.options()) : no_tensor(a.x)};
  add_gradients(gradients, kOp, "needs_up", a.up, needs.up);
  add_gradients(gradients, kOp, "needs_down", a.down, needs.down);
  return gradients;
}

void check_backward(const BackwardArgs& b) {
  const auto& [grad, a, hidden, needs] = b;
  check_arguments(a);
  check_grad(kOp, grad, a.layout, RowOrder::kToken, a.model_features(), a.x);
  check_hidden(kOp, hidden, {a.layout.num_slots(), a.up_columns()}, a.x);
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
  ExpertFfnBackwardParams params{};
  params.forward = operands.params(a, backend);
  params.forward.hidden = data_or_null(saved);
  params.grad = view_rows(grad_rows, RowOrder::kToken);
  params.grad_x = data_or_null(gradients[0]);
  params.grad_gates = data_or_null(gradients[1]);
  const at::TensorList all(gradients);
  const auto up_pointers = expert_pointers(all.slice(2, a.up.size()), operands.up);
  const auto down_pointers = expert_pointers(all.slice(2 + a.up.size()), operands.down);
  params.grad_up = up_pointers.data();
  params.grad_down = down_pointers.data();
  launch(kOp, backend, {a.x, a.up[0], a.down[0]}, params, expert_ffn_backward_cpu,
         MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda), MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda_workspace));
  return gradients;
}

struct ExpertFfn {
  using Args = mfx::Args;
  static constexpr const char* kOp = mfx::kOp;
  template <bool kMeta>
  static constexpr auto kernel_forward = &mfx::forward<kMeta>;
  template <bool kMeta>
  static constexpr auto kernel_backward = &mfx::backward<kMeta>;

  static auto inputs(const Args& a) { return tensor_list(a.x, a.gates, a.up, a.down); }
  static auto forward(const Args& a, bool save_hidden) {
    return call<"expert_ffn_forward", kernel_forward<false>>({a, save_hidden});
  }
  static auto backward(const at::Tensor& grad, const Args& a, const at::Tensor& hidden, const c10::List<bool>& needs) {
    const size_t down = 2 + a.up.size();
    return call<"expert_ffn_backward", kernel_backward<false>>(
        {grad, a, hidden, {needs[0], needs[1], slice(needs, 2, down), slice(needs, down, needs.size())}});
  }
  // x and the matrices in the autocast type; gates stay float32, as the router made them.
  static at::Tensor autocast(Args a) {
    const Autocast cast(a.x);
    cast(a.x);
    cast(a.up);
    cast(a.down);
    cast.cast(a.gates, at::kFloat);
    return call<"expert_ffn", &autocast>(a);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  // The backward op's results: gradients of x, gates and each segment of up, then of down; an empty tensor for those
  // not needed.
  define<ExpertFfn>(
      m,
      "Tensor x, Tensor[] up, Tensor[] down, Tensor offsets, Tensor slot_order, Tensor position, int num_choices, "
      "Tensor gates, str activation",
      "bool[] needs_up, bool[] needs_down");
}

}  // namespace mfx
