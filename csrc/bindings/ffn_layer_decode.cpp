#include <string>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

struct FfnLayerDecode {
  static constexpr OpName kName{"ffn_layer_decode"};

  struct Args {
    LayerInput input;
    std::vector<at::Tensor> up, down;
    std::string activation;
  };

  static void check(const Args& a);
  static void decode(const Args& a, LayerResults& results);
  static void refuse_gradients(const Args& a, const RefuseGradient& refuse) {
    refuse("up", a.up);
    refuse("down", a.down);
  }
};
constexpr const char* kOp = FfnLayerDecode::kName.text;

void FfnLayerDecode::check(const Args& a) {
  a.input.check(kOp);
  const at::Tensor& x = a.input.x();
  const bool gated = parse_activation(kOp, a.activation).gated;
  const c10::SymInt features = x.sym_size(2), experts = a.input.network.num_experts();
  check_segments(kOp, "up", a.up, experts, "the gate", x);
  check_segments(kOp, "down", a.down, experts, "the gate", x);
  check_ffn(kOp, x, a.up[0], a.down[0], gated);
}

void FfnLayerDecode::decode(const Args& a, LayerResults& results) {
  const at::Tensor& x = a.input.x();
  const Backend backend = backend_of(kOp, "x", x);
  const auto [routing, memory] = buffers_beside<Routing>(x, a.input, results.route);

  const at::Tensor tokens = a.input.normed();
  const RoutedLayout layout = route(kOp, backend, a.input, tokens, routing);
  const MatrixOperand up(a.up), down(a.down);
  const DType dtype = check_float_dtype(kOp, "x", x);
  const ExpertFfnParams params = {
      .dtype = dtype,
      .layout = layout,
      .activation = parse_activation(kOp, a.activation),
      .model_features = x.size(2),
      .hidden_features = down.rows(),
      .x = {tokens.const_data_ptr(), RowOrder::kToken, x.size(2), 0},
      .up = up.view(),
      .down = down.view(),
      .up_bias = nullptr,
      .down_bias = nullptr,
      .gates = routing.gates,
      .out = results.y.mutable_data_ptr(),
      .hidden = nullptr,
      .allow_tf32 = allow_tf32(backend, dtype),
  };
  launch(kOp, backend, {x, a.up[0], a.down[0]}, params, expert_ffn_cpu, MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda),
         MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
  results.y.add_(x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  LayerDecode<FfnLayerDecode>::define(m, "Tensor[] up, Tensor[] down, str activation");
}

}  // namespace mfx
