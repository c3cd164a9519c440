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

bool is_quantised(const FfnLayerDecode::Args& a) {
  return a.up.is_quantised() || a.down.is_quantised();
}

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

struct Buffers {
  Routing routing;
  void* hidden;  // of quantised experts, in expert order

  Buffers(Workspace& memory, const FfnLayerDecode::Args& a, const std::vector<at::Tensor>& route_results)
      : routing(memory, a.input, route_results) {
    const at::Tensor& x = a.input.x();
    const int64_t slots = a.input.num_tokens().expect_int() * a.input.k, width = a.down.shape().in.expect_int();
    hidden = is_quantised(a) ? memory.take<char>(slots * width * static_cast<int64_t>(x.element_size())) : nullptr;
  }
};

void FfnLayerDecode::decode(const Args& a, LayerResults& results) {
  const at::Tensor& x = a.input.x();
  const Backend backend = backend_of(kOp, "x", x);
  if (is_quantised(a)) check_cpu(kOp, "x", x);
  const auto [buffers, memory] = buffers_beside<Buffers>(x, a, results.route);
  const auto& [routing, hidden] = buffers;

  const at::Tensor tokens = a.input.normed();
  const RoutedLayout layout = route(kOp, backend, a.input, tokens, routing);
  const RoutedRows rows = {tokens.const_data_ptr(), RowOrder::kToken, x.size(2), 0};
  const ActivationSpec activation = parse_activation(kOp, a.activation);
  if (is_quantised(a)) {
    multiply(kOp, backend, x, layout, a.up, {activation, rows, RowOrder::kExpert, nullptr, hidden});
    multiply(kOp, backend, x, layout, a.down,
             {{},
              {hidden, RowOrder::kExpert, a.down.shape().in.expect_int(), 0},
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
