#include <ATen/ops/empty.h>

#include <string>

#include "bindings/autograd.hpp"
#include "bindings/expert_weight.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

struct FfnLayerDecode {
  static constexpr OpName kName{"ffn_layer_decode"};

  struct Args {
    LayerInput input;
    ExpertWeight up, down;
    std::string activation;
  };

  static void check(const Args& a);
  static void decode(const Args& a, LayerResults& results);
  static void refuse_gradients(const Args& a, const RefuseGradient& refuse) {
    refuse("up", a.up.tensors);
    refuse("down", a.down.tensors);
  }
};
constexpr const char* kOp = FfnLayerDecode::kName.text;

void FfnLayerDecode::check(const Args& a) {
  a.input.check(kOp);
  const at::Tensor& x = a.input.x();
  const bool gated = parse_activation(kOp, a.activation).gated;
  const c10::SymInt experts = a.input.network.num_experts();
  a.up.check(kOp, "up", experts, x);
  a.down.check(kOp, "down", experts, x);
  check_ffn(kOp, x, a.up.shape(), a.down.shape(), gated);
  if (gated && a.up.is_quantised()) a.up.quantised().check_gated(kOp, "up");
}

void FfnLayerDecode::decode(const Args& a, LayerResults& results) {
  const at::Tensor& x = a.input.x();
  const Backend backend = backend_of(kOp, "x", x);
  const bool quantised = a.up.is_quantised() || a.down.is_quantised();
  if (quantised) check_cpu(kOp, "x", x);
  const auto [routing, memory] = buffers_beside<Routing>(x, a.input, results.route);

  const at::Tensor tokens = a.input.normed();
  const RoutedLayout layout = route(kOp, backend, a.input, tokens, routing);
  const RoutedRows rows = {tokens.const_data_ptr(), RowOrder::kToken, x.size(2), 0};
  const ActivationSpec activation = parse_activation(kOp, a.activation);
  if (quantised) {
    const int64_t width = a.down.shape().in.expect_int();
    const at::Tensor hidden = at::empty({layout.num_slots(), width}, x.options());
    multiply(kOp, backend, x, layout, a.up, {activation, rows, RowOrder::kExpert, nullptr, hidden.mutable_data_ptr()});
    multiply(kOp, backend, x, layout, a.down,
             {{},
              {hidden.const_data_ptr(), RowOrder::kExpert, width, 0},
              RowOrder::kToken,
              routing.gates,
              results.y.mutable_data_ptr()});
    results.y.add_(x);
    return;
  }
  const MatrixOperand up(a.up.tensors), down(a.down.tensors);
  const DType dtype = check_float_dtype(kOp, "x", x);
  const ExpertFfnParams params = {
      .dtype = dtype,
      .layout = layout,
      .activation = activation,
      .model_features = x.size(2),
      .hidden_features = down.rows(),
      .x = rows,
      .up = up.view(),
      .down = down.view(),
      .up_bias = nullptr,
      .down_bias = nullptr,
      .gates = routing.gates,
      .out = results.y.mutable_data_ptr(),
      .hidden = nullptr,
      .allow_tf32 = allow_tf32(backend, dtype),
  };
  launch(kOp, backend, {x, a.up.tensors[0], a.down.tensors[0]}, params, expert_ffn_cpu,
         MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda), MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
  results.y.add_(x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  LayerDecode<FfnLayerDecode>::define(m,
                                      "Tensor[] up, int[] up_format, Tensor[] down, int[] down_format, str activation");
}

}  // namespace mfx
