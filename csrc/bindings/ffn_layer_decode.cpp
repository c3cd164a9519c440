#include <ATen/core/LegacyTypeDispatch.h>

#include <string>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "ffn_layer_decode";

struct Args {
  LayerInput input;
  std::vector<at::Tensor> up, down;
  std::string activation;
};

void check_arguments(const Args& a) {
  a.input.check(kOp);
  const at::Tensor& x = a.input.x();
  const bool gated = parse_activation(kOp, a.activation).gated;
  const c10::SymInt features = x.sym_size(2), experts = a.input.network.num_experts();
  check_segments(kOp, "up", a.up, experts, "the gate", x);
  check_segments(kOp, "down", a.down, experts, "the gate", x);
  check_ffn(kOp, x, a.up[0], a.down[0], gated);
}

template <bool kMeta>
LayerResults decode(const Args& a, bool with_route) {
  check_arguments(a);
  const at::Tensor& x = a.input.x();
  LayerResults results(a.input, with_route);
  if constexpr (kMeta) return results;
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
  return results;
}

template <bool kMeta>
at::Tensor ffn_layer_decode(const Args& a) {
  return decode<kMeta>(a, false).y;
}
template <bool kMeta>
auto with_route(const Args& a) {
  return decode<kMeta>(a, true).all();
}

void refuse_gradients(const Args& a) {
  constexpr const char* kInstead = "the layer's ops one by one";
  a.input.refuse_gradients(kOp, kInstead);
  mfx::refuse_gradients(kOp, "up", a.up, kInstead);
  mfx::refuse_gradients(kOp, "down", a.down, kInstead);
}
at::Tensor without_gradient(const Args& a) {
  refuse_gradients(a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<"ffn_layer_decode", &ffn_layer_decode<false>>(a);
}
auto with_route_without_gradient(const Args& a) {
  refuse_gradients(a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<"ffn_layer_decode.with_route", &with_route<false>>(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  const std::string args = "(" + kLayerInput + ", Tensor[] up, Tensor[] down, str activation)";
  Definition(m, "ffn_layer_decode" + args + " -> Tensor")
      .kernel<&ffn_layer_decode<false>>({CPU, CUDA})
      .kernel<&ffn_layer_decode<true>>({Meta})
      .kernel<&without_gradient>({Autograd});
  Definition(m, "ffn_layer_decode.with_route" + args + " -> " + kRouteResults)
      .kernel<&with_route<false>>({CPU, CUDA})
      .kernel<&with_route<true>>({Meta})
      .kernel<&with_route_without_gradient>({Autograd});
}

}  // namespace mfx
