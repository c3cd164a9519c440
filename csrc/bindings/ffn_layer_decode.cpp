#include <string>

#include "bindings/expert_weight.hpp"
#include "bindings/ffn_layer_decode.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

bool is_quantised(const FfnLayerDecode::Args& a) {
  return a.up.is_quantised() || a.down.is_quantised();
}

}  // namespace

void FfnLayerDecode::refuse_gradients(const Args& a, const RefuseGradient& refuse) {
  a.input.refuse_gradients(refuse);
  refuse("up", a.up.tensors);
  refuse("down", a.down.tensors);
}

void FfnLayerDecode::check(const char* op, const Args& a) {
  a.input.check(op);
  const at::Tensor& x = a.input.x();
  const bool gated = parse_activation(op, a.activation).gated;
  const c10::SymInt experts = a.input.network.num_experts();
  a.up.check(op, "up", experts, x);
  a.down.check(op, "down", experts, x);
  check_ffn(op, x, a.up.shape(), a.down.shape(), gated);
  if (gated && a.up.is_quantised()) a.up.quantised().check_gated(op, "up");
}

void FfnLayerDecode::check_runnable(const char* op, const Args& a) {
  a.up.check_runnable(op, "up", a.input.x());
  a.down.check_runnable(op, "down", a.input.x());
}

namespace {

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

}  // namespace

void FfnLayerDecode::decode(const char* op, const Args& a, LayerResults& results) {
  const at::Tensor& x = a.input.x();
  const Backend backend = backend_of(op, "x", x);
  check_runnable(op, a);
  const auto [buffers, memory] = buffers_beside<Buffers>(x, a, results.route);
  const auto& [routing, hidden] = buffers;

  const at::Tensor tokens = a.input.normed();
  const RoutedLayout layout = route(op, backend, a.input, tokens, routing);
  const RoutedRows rows = {tokens.const_data_ptr(), RowOrder::kToken, x.size(2), 0};
  const ActivationSpec activation = parse_activation(op, a.activation);
  if (is_quantised(a)) {
    multiply(op, backend, x, layout, a.up, {activation, rows, RowOrder::kExpert, nullptr, hidden});
    multiply(op, backend, x, layout, a.down,
             {{},
              {hidden, RowOrder::kExpert, a.down.shape().in.expect_int(), 0},
              RowOrder::kToken,
              routing.gates,
              results.y.mutable_data_ptr()});
    results.y.add_(x);
    return;
  }
  const MatrixOperand up(a.up.tensors), down(a.down.tensors);
  const DType dtype = check_float_dtype(op, "x", x);
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
  launch(op, backend, {x, a.up.tensors[0], a.down.tensors[0]}, params, expert_ffn_cpu,
         MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda), MFX_CUDA_FUNCTION(mfx_expert_ffn_cuda_workspace));
  results.y.add_(x);
}

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  LayerDecode<FfnLayerDecode>::define(m,
                                      "Tensor[] up, int[] up_format, Tensor[] down, int[] down_format, str activation");
}

}  // namespace mfx
