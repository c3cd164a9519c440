#include <string>
#include <tuple>
#include <vector>

#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {
namespace {

struct ExpertFfn {
  static constexpr const char* kOp = "expert_ffn";

  struct Args {
    at::Tensor x;
    std::vector<at::Tensor> up, down;
    LayoutTensors layout;
    at::Tensor gates;
    std::string activation;
    OptionalTensor up_bias, down_bias;
  };
  struct Needs {
    bool x, gates, up_bias, down_bias;
    c10::List<bool> up, down;
  };
  using Params = ExpertFfnParams;
  using BackwardParams = ExpertFfnBackwardParams;

  static RowOrder out_order(const Args& /*a*/) { return RowOrder::kToken; }
  static ActivationSpec activation(const Args& a) { return parse_activation(kOp, a.activation); }

  static void check(const Args& a) {
    const bool gated = activation(a).gated;
    check_float_dtype(kOp, "x", a.x);
    check_layout(kOp, a.layout, a.x);
    check_rows(kOp, "x", a.x, a.layout, RowOrder::kToken);
    check_segments(kOp, "up", a.up, a.layout, a.x);
    check_segments(kOp, "down", a.down, a.layout, a.x);
    check_gates(kOp, a.gates, a.layout, a.x);
    check_ffn(kOp, a.x, {a.up[0].sym_size(1), a.up[0].sym_size(2)}, {a.down[0].sym_size(1), a.down[0].sym_size(2)},
              gated);
    const c10::SymInt features = a.up[0].sym_size(1), columns = a.up[0].sym_size(2);
    check_bias(kOp, "up_bias", a.up_bias, a.layout, columns, a.x);
    check_bias(kOp, "down_bias", a.down_bias, a.layout, features, a.x);
  }

  static c10::SymDimVector out_shape(const Args& a) { return c10::SymDimVector(a.x.sym_sizes()); }
  static c10::SymDimVector hidden_shape(const Args& a) { return {a.layout.num_slots(), a.up[0].sym_size(2)}; }

  struct Operands {
    at::Tensor x, gates, up_bias, down_bias;
    MatrixOperand up, down;

    explicit Operands(const Args& a)
        : x(with_unit_stride(a.x)),
          gates(a.gates.contiguous()),
          up_bias(contiguous(a.up_bias)),
          down_bias(contiguous(a.down_bias)),
          up(a.up),
          down(a.down) {}

    Params params(const Args& a, Backend backend) const {
      const DType dtype = check_float_dtype(kOp, "x", x);
      return {
          .dtype = dtype,
          .layout = a.layout.view(),
          .activation = activation(a),
          .model_features = x.size(1),
          .hidden_features = down.rows(),
          .x = view_rows(x, RowOrder::kToken),
          .up = up.view(),
          .down = down.view(),
          .up_bias = const_data_or_null(up_bias),
          .down_bias = const_data_or_null(down_bias),
          .gates = gates.const_data_ptr(),
          .out = nullptr,
          .hidden = nullptr,
          .allow_tf32 = allow_tf32(backend, dtype),
      };
    }
  };

  static auto inputs(const Args& a) { return tensor_list(a.x, a.gates, a.up_bias, a.down_bias, a.up, a.down); }
  static std::vector<at::Tensor> allocate_gradients(const Args& a, const Needs& needs) {
    std::vector<at::Tensor> gradients{
        needs.x ? empty_rows(a.x.sym_sizes(), a.x.options()) : no_tensor(a.x), gradient_like(a.gates, needs.gates, a.x),
        gradient_like(a.up_bias, needs.up_bias, a.x), gradient_like(a.down_bias, needs.down_bias, a.x)};
    add_gradients(gradients, kOp, "needs_up", a.up, needs.up);
    add_gradients(gradients, kOp, "needs_down", a.down, needs.down);
    return gradients;
  }
  static auto set_gradients(BackwardParams& params, at::TensorList gradients, const Operands& operands) {
    params.grad_x = data_or_null(gradients[0]);
    params.grad_gates = data_or_null(gradients[1]);
    params.grad_up_bias = data_or_null(gradients[2]);
    params.grad_down_bias = data_or_null(gradients[3]);
    const size_t segments = operands.up.num_segments();
    std::pair matrices(MatrixOperand(gradients.slice(4, segments), operands.up),
                       MatrixOperand(gradients.slice(4 + segments), operands.down));
    params.grad_up = matrices.first.view();
    params.grad_down = matrices.second.view();
    return matrices;
  }

  static void launch(Backend backend, const Args& a, const Params& params) {
    mfx::launch(kOp, backend, {a.x, a.up[0], a.down[0]}, params, expert_ffn_cpu, MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda),
                MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
  }
  static void launch(Backend backend, const Args& a, const BackwardParams& params) {
    mfx::launch(kOp, backend, {a.x, a.up[0], a.down[0]}, params, expert_ffn_backward_cpu,
                MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda),
                MFX_CUDA_FUNCTION(mfx_expert_ffn_backward_cuda_workspace));
  }

  static auto forward(const Args& a, bool save_hidden) {
    return call<"expert_ffn_forward", &routed_forward<ExpertFfn, false>>({a, save_hidden});
  }
  static auto backward(const at::Tensor& grad, const Args& a, const at::Tensor& hidden, const c10::List<bool>& needs) {
    const size_t up = 4, down = up + a.up.size();
    return call<"expert_ffn_backward", &routed_backward<ExpertFfn, false>>(
        {grad,
         a,
         hidden,
         {needs[0], needs[1], needs[2], needs[3], slice(needs, up, down), slice(needs, down, needs.size())}});
  }
  // x, matrices and biases in the autocast type; gates stay float32, as the router made them.
  static at::Tensor autocast(Args a) {
    const Autocast cast(a.x);
    cast(a.x);
    cast(a.up);
    cast(a.down);
    cast(a.up_bias);
    cast(a.down_bias);
    cast.cast(a.gates, at::kFloat);
    return call<"expert_ffn", &autocast>(a);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  // The backward op's results: gradients of x, gates, both biases and each segment of up, then of down; an empty
  // tensor for those not needed.
  define<ExpertFfn>(
      m,
      "Tensor x, Tensor[] up, Tensor[] down, Tensor offsets, Tensor slot_order, Tensor position, int num_choices, "
      "Tensor gates, str activation, Tensor? up_bias, Tensor? down_bias",
      "bool needs_up_bias, bool needs_down_bias, bool[] needs_up, bool[] needs_down");
}

}  // namespace mfx
