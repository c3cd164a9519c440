#include "moduleformer_ext/grouped_gemm.hpp"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

struct GroupedGemm {
  static constexpr const char* kOp = "grouped_gemm";

  struct Args {
    at::Tensor x;
    std::vector<at::Tensor> weight;
    LayoutTensors layout;
    std::string x_order, out_order;
    OptionalTensor gates;
    std::optional<std::string> activation;
    OptionalTensor bias;
  };
  struct Needs {
    bool x, gates, bias;
    c10::List<bool> weight;
  };
  using Params = GroupedGemmParams;
  using BackwardParams = GroupedGemmBackwardParams;

  static RowOrder x_order(const Args& a) { return parse_order(kOp, "x_order", a.x_order); }
  static RowOrder out_order(const Args& a) { return parse_order(kOp, "out_order", a.out_order); }
  static ActivationSpec activation(const Args& a) {
    return a.activation ? parse_activation(kOp, *a.activation) : ActivationSpec{};
  }

  static void check(const Args& a) {
    const RowOrder rows = x_order(a), order = out_order(a);
    const bool gated = activation(a).gated;
    check_float_dtype(kOp, "x", a.x);
    check_layout(kOp, a.layout, a.x);
    check_rows(kOp, "x", a.x, a.layout, rows);
    check_segments(kOp, "weight", a.weight, a.layout, a.x);
    const c10::SymInt in_features = a.weight[0].sym_size(1), columns = a.weight[0].sym_size(2);
    MFX_CHECK_ARG(a.x.sym_size(-1) == in_features, kOp, "x",
                  c10::str("have as many features as weight has rows (", in_features, ")"), a.x.sym_size(-1));
    MFX_CHECK_ARG(!gated || columns % 2 == 0, kOp, "weight", "have an even number of columns for a gated activation",
                  columns);
    check_bias(kOp, "bias", a.bias, a.layout, columns, a.x);
    if (a.gates) {
      check_gates(kOp, *a.gates, a.layout, a.x);
      MFX_CHECK_ARG(order == RowOrder::kToken, kOp, "out_order", "be 'token' where gates are given", "'", a.out_order,
                    "'");
    }
  }

  static c10::SymDimVector out_shape(const Args& a) {
    const c10::SymInt columns = a.weight[0].sym_size(2);
    return rows_shape(a.layout, out_order(a), activation(a).gated ? columns / 2 : columns);
  }
  static c10::SymDimVector hidden_shape(const Args& a) {
    if (activation(a).function == Activation::kNone) return {0};
    return {a.layout.num_slots(), a.weight[0].sym_size(2)};
  }

  struct Operands {
    at::Tensor x, gates, bias;
    MatrixOperand weight;

    explicit Operands(const Args& a)
        : x(with_unit_stride(a.x)), gates(contiguous(a.gates)), bias(contiguous(a.bias)), weight(a.weight) {}

    Params params(const Args& a, Backend backend) const {
      const DType dtype = check_float_dtype(kOp, "x", x);
      return {
          .dtype = dtype,
          .layout = a.layout.view(),
          .activation = activation(a),
          .in_features = weight.rows(),
          .out_features = weight.columns(),
          .x = view_rows(x, x_order(a)),
          .weight = weight.view(),
          .bias = const_data_or_null(bias),
          .gates = const_data_or_null(gates),
          .out_order = out_order(a),
          .out = nullptr,
          .hidden = nullptr,
          .allow_tf32 = allow_tf32(backend, dtype),
      };
    }
  };

  static auto inputs(const Args& a) { return tensor_list(a.x, a.gates, a.bias, a.weight); }
  static std::vector<at::Tensor> allocate_gradients(const Args& a, const Needs& needs) {
    std::vector<at::Tensor> gradients{needs.x ? empty_rows(a.x.sym_sizes(), a.x.options()) : no_tensor(a.x),
                                      gradient_like(a.gates, needs.gates, a.x), gradient_like(a.bias, needs.bias, a.x)};
    add_gradients(gradients, kOp, "needs_weight", a.weight, needs.weight);
    return gradients;
  }
  static auto set_gradients(BackwardParams& params, at::TensorList gradients, const Operands& operands) {
    params.grad_x = data_or_null(gradients[0]);
    params.grad_gates = data_or_null(gradients[1]);
    params.grad_bias = data_or_null(gradients[2]);
    MatrixOperand grad_weight(gradients.slice(3), operands.weight);
    params.grad_weight = grad_weight.view();
    return grad_weight;
  }

  static void launch(Backend backend, const Args& a, const Params& params) {
    mfx::launch(kOp, backend, {a.x, a.weight[0]}, params, grouped_gemm_cpu, MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda),
                MFX_CUDA_FUNCTION(mfx_grouped_gemm_cuda_workspace));
  }
  static void launch(Backend backend, const Args& a, const BackwardParams& params) {
    mfx::launch(kOp, backend, {a.x, a.weight[0]}, params, grouped_gemm_backward_cpu,
                MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda),
                MFX_CUDA_FUNCTION(mfx_grouped_gemm_backward_cuda_workspace));
  }

  static auto forward(const Args& a, bool save_hidden) {
    return call<"grouped_gemm_forward", &routed_forward<GroupedGemm, false>>({a, save_hidden});
  }
  static auto backward(const at::Tensor& grad, const Args& a, const at::Tensor& hidden, const c10::List<bool>& needs) {
    return call<"grouped_gemm_backward", &routed_backward<GroupedGemm, false>>(
        {grad, a, hidden, {needs[0], needs[1], needs[2], slice(needs, 3, needs.size())}});
  }
  // x, matrices and biases in the autocast type; gates stay float32, as the router made them.
  static at::Tensor autocast(Args a) {
    const Autocast cast(a.x);
    cast(a.x);
    cast(a.weight);
    cast(a.bias);
    if (a.gates) cast.cast(*a.gates, at::kFloat);
    return call<"grouped_gemm", &autocast>(a);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  // The backward op's results: gradients of x, gates, bias and each segment; an empty tensor for those not needed.
  define<GroupedGemm>(
      m,
      "Tensor x, Tensor[] weight, Tensor offsets, Tensor slot_order, Tensor position, int num_choices, str x_order, "
      "str out_order, Tensor? gates, str? activation, Tensor? bias",
      "bool needs_bias, bool[] needs_weight");
}

}  // namespace mfx
