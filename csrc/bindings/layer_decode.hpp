// What attention_layer_decode, ffn_layer_decode and blocks_decode share. A step is x + layer(norm(x)) for a few tokens:
// norm, router and layout come first, then what the layer does with its experts. They have no kernels of their own. The
// launchers of the other ops run one after the other on memory that is allocated once for all results in between, so
// that a step costs little beside its kernels.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/layer_norm.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/router_network.hpp"
#include "core/workspace.hpp"
#include "moduleformer_ext/expert_layout.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {

inline constexpr const char* kOpsWithGradients = "the layer's ops one by one";

// What both ops take first.
struct LayerInput {
  Network network;  // with x [B, T, D] before the norm
  int64_t k;
  std::string order;
  at::Tensor norm_weight, norm_bias;
  double norm_epsilon;

  const at::Tensor& x() const { return network.x; }
  c10::SymInt num_tokens() const { return x().sym_size(0) * x().sym_size(1); }

  void check(const char* op) const {
    check_dim(op, "x", x(), 3);
    check_float_dtype(op, "x", x());
    const c10::SymInt dim = x().sym_size(2);
    MFX_CHECK_ARG(dim >= 1, op, "x", "have at least one feature", "shape ", x().sym_sizes());
    MFX_CHECK_ARG(network.gate == "linear" || network.gate == "mlp" || network.gate == "gmm", op, "gate",
                  "be 'linear', 'mlp' or 'gmm'", "'", network.gate, "'");
    network.check_parameters(op, "gate_weight");
    check_k(op, k, network.num_experts());
    parse_router_order(op, order);
    check_tensor(op, "norm_weight", norm_weight, {dim}, x().scalar_type(), "x", x());
    check_tensor(op, "norm_bias", norm_bias, {dim}, x().scalar_type(), "x", x());
  }

  void refuse_gradients(const RefuseGradient& refuse) const {
    refuse("x", x());
    refuse("hidden_weight", network.hidden_weight);
    refuse("hidden_bias", network.hidden_bias);
    refuse("gate_weight", network.weight);
    refuse("norm_weight", norm_weight);
    refuse("norm_bias", norm_bias);
  }

  at::Tensor normed() const { return at::layer_norm(x(), {x().size(2)}, norm_weight, norm_bias, norm_epsilon); }
};

// y, and the fields of RouteTopK where they are asked for: an overload of its own returns them, because torch
// functionalises no op that changes its arguments and returns a list.
struct LayerResults {
  at::Tensor y;
  std::vector<at::Tensor> route;

  LayerResults(const LayerInput& input, bool with_route)
      : y(at::empty_symint(input.x().sym_sizes(), input.x().options())) {
    if (with_route) route = allocate_route(input.network, input.num_tokens(), input.k);
  }
  auto all() const { return std::tuple(y, route[0], route[1], route[2], route[3], route[4], route[5], route[6]); }
};

// How tokens were routed: the fields of RouteTopK, and of ExpertLayout without the counts that both have.
struct Routing {
  void *gates, *prob_sum, *plogp_sum, *logsumexp_sq_sum, *logits;
  int32_t *expert_ids, *counts, *offsets, *slot_order, *position;

  Routing(Workspace& memory, const LayerInput& input, const std::vector<at::Tensor>& results) {
    const int64_t tokens = input.num_tokens().expect_int(), experts = input.network.num_experts().expect_int();
    const int64_t slots = tokens * input.k;
    const auto number = static_cast<int64_t>(c10::elementSize(result_type(input.x())));
    const auto field = [&](size_t i, int64_t bytes) -> void* {
      return results.empty() ? memory.take<char>(bytes) : results[i].mutable_data_ptr();
    };
    gates = field(0, slots * number);
    expert_ids = static_cast<int32_t*>(field(1, slots * static_cast<int64_t>(sizeof(int32_t))));
    prob_sum = field(2, experts * number);
    plogp_sum = field(3, number);
    logsumexp_sq_sum = field(4, number);
    counts = static_cast<int32_t*>(field(5, experts * static_cast<int64_t>(sizeof(int32_t))));
    logits = field(6, tokens * experts * number);
    offsets = memory.take<int32_t>(experts + 1);
    slot_order = memory.take<int32_t>(slots);
    position = memory.take<int32_t>(slots);
  }
};

// Routes tokens [..., D]. The results point into `routing`.
inline RoutedLayout route(const char* op, Backend backend, const LayerInput& input, const at::Tensor& tokens,
                          const Routing& routing) {
  const NetworkParams network(input.network, tokens);
  const int64_t num_tokens = network.get().num_tokens, num_experts = network.get().num_experts;
  const RouteTopKParams topk = {
      .network = network.get(),
      .k = input.k,
      .order = parse_router_order(op, input.order),
      .ranking = {},
      .num_sampled = 0,
      .noise = nullptr,
      .gates = routing.gates,
      .expert_ids = routing.expert_ids,
      .prob_sum = routing.prob_sum,
      .plogp_sum = routing.plogp_sum,
      .logsumexp_sq_sum = routing.logsumexp_sq_sum,
      .counts = routing.counts,
      .logits = routing.logits,
      .hidden = nullptr,
  };
  launch(op, backend, {tokens}, topk, route_topk_cpu, MFX_CUDA_FUNCTION(mfx_route_topk_cuda),
         MFX_CUDA_FUNCTION(mfx_route_topk_cuda_workspace));
  const ExpertLayoutParams layout = {
      .expert_ids = routing.expert_ids,
      .ids_are_int64 = false,
      .num_slots = num_tokens * input.k,
      .num_experts = num_experts,
      .counts = routing.counts,
      .offsets = routing.offsets,
      .slot_order = routing.slot_order,
      .position = routing.position,
  };
  launch(op, backend, {tokens}, layout, expert_layout_cpu, MFX_CUDA_FUNCTION(mfx_expert_layout_cuda),
         MFX_CUDA_FUNCTION(mfx_expert_layout_cuda_workspace));
  return {routing.offsets, routing.slot_order, routing.position, num_experts, num_tokens, input.k};
}

// A struct of pointers, made by Buffers(Workspace&, sizes...), and the memory that they lie in.
template <typename Buffers, typename... Sizes>
std::pair<Buffers, at::Tensor> buffers_beside(const at::Tensor& x, const Sizes&... sizes) {
  Workspace needed(nullptr);
  static_cast<void>(Buffers(needed, sizes...));
  at::Tensor memory = at::empty({needed.bytes()}, x.options().dtype(at::kByte));
  Workspace workspace(memory.mutable_data_ptr());
  return {Buffers(workspace, sizes...), memory};
}

// The kernels of an op, for every dispatch key. `Op` has kName, Args with an input, check(op, args), decode(op,
// args, results) and refuse_gradients(args, refuse).
template <typename Op>
class LayerDecode {
 public:
  // `own_args` is what the op takes behind what both take.
  static void define(torch::Library& library, const std::string& own_args) {
    using enum c10::DispatchKey;
    const std::string name = Op::kName.text;
    const std::string args =
        "(Tensor x, str gate, Tensor? hidden_weight, Tensor? hidden_bias, Tensor[] gate_weight, int k, str order, "
        "Tensor norm_weight, Tensor norm_bias, float norm_epsilon, " +
        own_args + ") -> ";
    Definition plain(library, name + args + "Tensor");
    plain.kernel<&y<false>>({CPU, CUDA});
    plain.kernel<&y<true>>({Meta});
    plain.kernel<&y_without_gradient>({Autograd});
    Definition routed(library, name + ".with_route" + args +
                                   "(Tensor y, Tensor gates, Tensor expert_ids, Tensor prob_sum, Tensor plogp_sum, "
                                   "Tensor logsumexp_sq_sum, Tensor counts, Tensor logits)");
    routed.kernel<&with_route<false>>({CPU, CUDA});
    routed.kernel<&with_route<true>>({Meta});
    routed.kernel<&with_route_without_gradient>({Autograd});
  }

 private:
  using Args = typename Op::Args;

  template <bool kMeta>
  static LayerResults run(const Args& a, bool with_route) {
    const char* const op = Op::kName.text;
    Op::check(op, a);
    LayerResults results(a.input, with_route);
    if constexpr (!kMeta) Op::decode(op, a, results);
    return results;
  }
  template <bool kMeta>
  static at::Tensor y(const Args& a) {
    return run<kMeta>(a, false).y;
  }
  template <bool kMeta>
  static auto with_route(const Args& a) {
    return run<kMeta>(a, true).all();
  }

  static void refuse_gradients(const Args& a) { Op::refuse_gradients(a, {Op::kName.text, kOpsWithGradients}); }
  static at::Tensor y_without_gradient(const Args& a) {
    refuse_gradients(a);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<Op::kName, &y<false>>(a);
  }
  static auto with_route_without_gradient(const Args& a) {
    refuse_gradients(a);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<Op::kName + ".with_route", &with_route<false>>(a);
  }
};

}  // namespace mfx
