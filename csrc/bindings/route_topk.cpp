// route_topk          the op: forward results only
// route_topk_forward  the same and what the backward needs (the hidden layer before its nonlinearity)
// route_topk_backward the gradients that are wanted, in the order x, hidden_weight, hidden_bias, segments of weight
#include "moduleformer_ext/route_topk.hpp"

#include <ATen/ops/empty.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/router_network.hpp"

namespace mfx {
namespace {

using at::Tensor;
// gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ResultsAndHidden = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// How the gates follow from the chosen logits; all that backward has to know of the choice.
struct Gates {
  std::string order;
  double scale;
};
struct Ranking {
  OptionalTensor selection_bias;
  int64_t num_groups, top_groups, scored_per_group;
};
struct Args {
  Network network;
  int64_t k;
  Gates gates;
  OptionalTensor noise;
  int64_t num_sampled;
  Ranking ranking;
};
struct ForwardArgs {
  Args args;
  bool save_hidden;
};
struct Saved {
  Tensor expert_ids, logits, hidden;
};
struct BackwardArgs {
  OptionalTensor grad_gates, grad_prob_sum, grad_plogp_sum, grad_logsumexp_sq_sum, grad_logits;
  Network network;
  Gates gates;
  Saved saved;
  c10::List<bool> wanted;  // a flag for x, hidden_weight, hidden_bias and each segment of weight
};

void check_ranking(const Network& network, int64_t k, const c10::SymInt& num_experts, const Ranking& ranking) {
  const char* op = network.op();
  const auto& [bias, num_groups, top_groups, scored_per_group] = ranking;
  if (bias.has_value()) {
    check_dim(op, "selection_bias", *bias, 1);
    check_float_dtype(op, "selection_bias", *bias);
    check_same_device(op, "selection_bias", *bias, "x", network.x);
    MFX_CHECK_ARG(bias->sym_size(0) == num_experts, op, "selection_bias",
                  c10::str("have shape [E] = [", num_experts, "]"), "shape ", bias->sym_sizes());
  }
  MFX_CHECK_ARG(num_groups >= 1 && num_experts % num_groups == 0, op, "num_groups",
                c10::str("divide the ", num_experts, " experts"), num_groups);
  MFX_CHECK_ARG(top_groups >= 1 && top_groups <= num_groups, op, "top_groups",
                c10::str("be in [1, ", num_groups, "] (num_groups)"), top_groups);
  MFX_CHECK_ARG(num_experts / num_groups * top_groups >= k, op, "top_groups",
                c10::str("leave at least k = ", k, " experts, of groups of ", num_experts / num_groups), top_groups);
  MFX_CHECK_ARG(scored_per_group == 1 || scored_per_group == 2, op, "scored_per_group", "be 1 or 2", scored_per_group);
}

void check_arguments(const Args& a) {
  const auto& [network, k, gates, noise, num_sampled, ranking] = a;
  network.check();
  const char* op = network.op();
  const auto num_experts = network.num_experts();
  check_k(op, k, num_experts);
  const RouterOrder order = parse_router_order(op, gates.order);
  check_scale(op, gates.scale);
  check_ranking(network, k, num_experts, ranking);
  const bool samples_softmax =
      !scores_are_sigmoids(order) && !ranking.selection_bias.has_value() && ranking.top_groups == ranking.num_groups;
  MFX_CHECK_ARG(samples_softmax || num_sampled == 0, op, "num_sampled",
                "be 0 with sigmoids, selection_bias or groups left out", num_sampled);
  MFX_CHECK_ARG(num_sampled >= 0 && num_sampled <= k, op, "num_sampled", c10::str("be in [0, ", k, "] (k)"),
                num_sampled);
  MFX_CHECK_ARG(noise.has_value() == (num_sampled > 0), op, "noise",
                c10::str("be given if and only if num_sampled > 0 (it is ", num_sampled, ")"),
                noise.has_value() ? "one" : "none");
  if (!noise.has_value()) return;
  check_dim(op, "noise", *noise, 2);
  check_float_dtype(op, "noise", *noise);
  check_same_device(op, "noise", *noise, "x", network.x);
  MFX_CHECK_ARG(noise->sym_size(0) == network.x.sym_size(0) && noise->sym_size(1) == num_experts, op, "noise",
                c10::str("have shape [T, E] = [", network.x.sym_size(0), ", ", num_experts, "]"), "shape ",
                noise->sym_sizes());
}

ResultsAndHidden allocate(const Network& network, int64_t k, bool save_hidden) {
  const auto real = network.x.options().dtype(result_type(network.x));
  const bool hidden = save_hidden && has_hidden_layer(network.kind());
  const std::vector<Tensor> r = allocate_route(network, network.x.sym_size(0), k);
  return {r[0], r[1],
          r[2], r[3],
          r[4], r[5],
          r[6], hidden ? at::empty_symint({network.x.sym_size(0), network.hidden_dim()}, real) : at::empty({0}, real)};
}

template <bool kMeta>
ResultsAndHidden forward(const ForwardArgs& f) {
  const auto& [args, save_hidden] = f;
  const auto& [network, k, choice, noise, num_sampled, ranking] = args;
  check_arguments(args);
  if constexpr (kMeta) return allocate(network, k, save_hidden);
  const Tensor& x = network.x;
  const char* op = network.op();
  const Backend backend = backend_of(op, "x", x);
  MFX_CHECK_ARG(x.size(0) <= std::numeric_limits<int32_t>::max() / k, op, "x",
                "have fewer than 2^31 slots (tokens times k)", "shape ", x.sizes());
  const NetworkParams network_params(network);
  const Tensor noise_values = noise.has_value() ? noise->to(result_type(x)).contiguous() : Tensor();
  const OptionalTensor& bias = ranking.selection_bias;
  const Tensor bias_values = bias.has_value() ? bias->to(result_type(x)).contiguous() : Tensor();
  ResultsAndHidden results = allocate(network, k, save_hidden);
  auto& [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] = results;
  const RouteTopKParams params = {
      .network = network_params.get(),
      .k = k,
      .order = parse_router_order(op, choice.order),
      .ranking = {.bias = bias.has_value() ? bias_values.const_data_ptr() : nullptr,
                  .num_groups = ranking.num_groups,
                  .top_groups = ranking.top_groups,
                  .scored_per_group = ranking.scored_per_group},
      .scale = choice.scale,
      .num_sampled = num_sampled,
      .noise = noise.has_value() ? noise_values.const_data_ptr() : nullptr,
      .gates = gates.mutable_data_ptr(),
      .expert_ids = expert_ids.mutable_data_ptr<int32_t>(),
      .prob_sum = prob_sum.mutable_data_ptr(),
      .plogp_sum = plogp_sum.mutable_data_ptr(),
      .logsumexp_sq_sum = logsumexp_sq_sum.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .logits = logits.mutable_data_ptr(),
      .hidden = save_hidden && has_hidden_layer(network.kind()) ? hidden.mutable_data_ptr() : nullptr,
  };
  launch(op, backend, {x, logits, gates}, params, route_topk_cpu, MFX_CUDA_FUNCTION(mfx_route_topk_cuda),
         MFX_CUDA_FUNCTION(mfx_route_topk_cuda_workspace));
  return results;
}

Results without_hidden(ResultsAndHidden results) {
  auto& [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] = results;
  return {gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits};
}

template <bool kMeta>
Results route_topk(const Args& a) {
  return without_hidden(forward<kMeta>({a, /*save_hidden=*/false}));
}

void check_backward(const BackwardArgs& b) {
  const Network& network = b.network;
  network.check();
  const char* op = network.op();
  const auto& [expert_ids, logits, hidden] = b.saved;
  check_dim(op, "expert_ids", expert_ids, 2);
  const auto tokens = network.x.sym_size(0), experts = network.num_experts(), k = expert_ids.sym_size(1);
  MFX_CHECK_ARG(expert_ids.sym_size(0) == tokens && k >= 1 && k <= experts, op, "expert_ids",
                c10::str("have shape [T, k] with T = ", tokens, " and k in [1, ", experts, "]"), "shape ",
                expert_ids.sym_sizes());
  check_dtype(op, "expert_ids", expert_ids, at::kInt);
  check_same_device(op, "expert_ids", expert_ids, "x", network.x);
  const auto check_result = [&](const char* name, const OptionalTensor& tensor, at::SymIntArrayRef shape) {
    if (!tensor.has_value()) return;
    check_tensor(op, name, *tensor, shape, result_type(network.x), "x", network.x);
  };
  check_result("logits", logits, {tokens, experts});
  if (has_hidden_layer(network.kind())) {
    check_result("hidden", hidden, {tokens, network.hidden_dim()});
  } else {
    check_result("hidden", hidden, {0});
  }
  check_result("grad_gates", b.grad_gates, {tokens, k});
  check_result("grad_prob_sum", b.grad_prob_sum, {experts});
  check_result("grad_plogp_sum", b.grad_plogp_sum, {});
  check_result("grad_logsumexp_sq_sum", b.grad_logsumexp_sq_sum, {});
  check_result("grad_logits", b.grad_logits, {tokens, experts});
  parse_router_order(op, b.gates.order);
  check_scale(op, b.gates.scale);
}

// What may require grad, in the order of `wanted`; undefined tensors for what the gate does not have.
std::vector<Tensor> differentiable(const Network& network) {
  return tensor_list(network.x, network.hidden_weight, network.hidden_bias, network.weight);
}

// One per wanted input, in order.
std::vector<Tensor> allocate_gradients(const Network& network, const c10::List<bool>& wanted) {
  const std::vector<Tensor> inputs = differentiable(network);
  MFX_CHECK_ARG(wanted.size() == inputs.size(), network.op(), "wanted", c10::str("have ", inputs.size(), " flags"),
                wanted.size());
  std::vector<Tensor> gradients;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    MFX_CHECK_ARG(!wanted[i] || inputs[i].defined(), network.op(), "wanted", "be true for inputs that are there alone",
                  "true for input ", i);
    if (wanted[i]) gradients.push_back(at::empty_symint(inputs[i].sym_sizes(), inputs[i].options()));
  }
  return gradients;
}

template <bool kMeta>
std::vector<Tensor> backward(const BackwardArgs& b) {
  check_backward(b);
  const Network& network = b.network;
  const Saved& saved = b.saved;
  const c10::List<bool>& wanted = b.wanted;
  if constexpr (kMeta) return allocate_gradients(network, wanted);
  const Tensor& x = network.x;
  const OptionalTensor& hidden_bias = network.hidden_bias;
  const Backend backend = backend_of(network.op(), "x", x);
  const NetworkParams network_params(network);
  std::vector<Tensor> copies;
  const auto pointer = [&](const OptionalTensor& tensor) -> const void* {
    return tensor.has_value() ? copies.emplace_back(tensor->contiguous()).const_data_ptr() : nullptr;
  };
  std::vector<Tensor> gradients = allocate_gradients(network, wanted);
  auto gradient = gradients.begin();
  const auto target = [&](std::size_t i) -> void* { return wanted[i] ? (gradient++)->mutable_data_ptr() : nullptr; };
  void* grad_x = target(0);
  void* grad_hidden_weight = target(1);
  // The kernel sums the bias in the result type; one of 16 bits is rounded from there.
  Tensor bias;
  void* grad_hidden_bias = nullptr;
  const auto bias_gradient = gradient;
  if (wanted[2]) {
    bias = at::empty(hidden_bias->sizes(), hidden_bias->options().dtype(result_type(x)));
    grad_hidden_bias = bias.mutable_data_ptr();
    ++gradient;
  }
  std::vector<void*> grad_segments;
  for (std::size_t i = 0; i < network.weight.size(); ++i) grad_segments.push_back(target(3 + i));
  const RouteTopKBackwardParams params = {
      .network = network_params.get(),
      .k = saved.expert_ids.size(1),
      .order = parse_router_order(network.op(), b.gates.order),
      .scale = b.gates.scale,
      .logits = pointer(saved.logits),
      .hidden = pointer(saved.hidden),
      .expert_ids = copies.emplace_back(saved.expert_ids.contiguous()).const_data_ptr<int32_t>(),
      .grad_gates = pointer(b.grad_gates),
      .grad_prob_sum = pointer(b.grad_prob_sum),
      .grad_plogp_sum = pointer(b.grad_plogp_sum),
      .grad_logsumexp_sq_sum = pointer(b.grad_logsumexp_sq_sum),
      .grad_logits = pointer(b.grad_logits),
      .grad_x = grad_x,
      .grad_hidden_weight = grad_hidden_weight,
      .grad_hidden_bias = grad_hidden_bias,
      .grad_segments = grad_segments.data(),
  };
  launch(network.op(), backend, {x, saved.logits, saved.expert_ids}, params, route_topk_backward_cpu,
         MFX_CUDA_FUNCTION(mfx_route_topk_backward_cuda), MFX_CUDA_FUNCTION(mfx_route_topk_backward_cuda_workspace));
  if (wanted[2]) *bias_gradient = bias.to(hidden_bias->scalar_type());
  return gradients;
}

struct RouteTopK : torch::autograd::Function<RouteTopK> {
  static std::vector<Tensor> forward(torch::autograd::AutogradContext* ctx, at::TensorList /*inputs*/, const Args& a) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] =
        call<"route_topk_forward", &mfx::forward<false>>({a, /*save_hidden=*/true});
    ctx->mark_non_differentiable({expert_ids, counts});
    ctx->set_materialize_grads(false);
    save_args(ctx, a.network, a.gates, Saved{expert_ids, logits, hidden});
    return {gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits};
  }

  static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grads) {
    const auto [network, gates, saved] = saved_args<Network, Gates, Saved>(ctx);
    const std::vector<Tensor> inputs = differentiable(network);
    const c10::List<bool> wanted = needed_gradients(ctx, inputs);
    const std::vector<Tensor> gradients = call<"route_topk_backward", &mfx::backward<false>>(
        {if_defined(grads[0]), if_defined(grads[2]), if_defined(grads[3]), if_defined(grads[4]), if_defined(grads[6]),
         network, gates, saved, wanted});
    auto next = gradients.begin();
    std::vector<Tensor> all(inputs.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (wanted[i]) all[i] = *next++;
    }
    return gradients_of_defined(inputs, all);
  }
};

Results autograd(const Args& a) {
  const std::vector<Tensor> inputs = differentiable(a.network);
  refuse_forward_mode(a.network.op(), at::TensorList(inputs), a.noise, a.ranking.selection_bias);
  if (!records_grad(at::TensorList(inputs))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<"route_topk", &autograd>(a);
  }
  const std::vector<Tensor> r = apply<RouteTopK>(inputs, a);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

}  // namespace

// Autocast falls through: whatever the types, products are summed and everything after them is computed in float.
TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  const std::string network = "Tensor x, str gate, Tensor? hidden_weight, Tensor? hidden_bias, Tensor[] weight, ";
  const std::string args = network +
                           "int k, str order, float scale, Tensor? noise, int num_sampled, Tensor? selection_bias, "
                           "int num_groups, int top_groups, int scored_per_group";
  const std::string results =
      "Tensor gates, Tensor expert_ids, Tensor prob_sum, Tensor plogp_sum, Tensor logsumexp_sq_sum, Tensor counts, "
      "Tensor logits";
  Definition(m, "route_topk(" + args + ") -> (" + results + ")")
      .kernel<&route_topk<false>>({CPU, CUDA})
      .kernel<&route_topk<true>>({Meta})
      .kernel<&autograd>({Autograd});
  Definition(m, "route_topk_forward(" + args + ", bool save_hidden) -> (" + results + ", Tensor hidden)")
      .kernel<&forward<false>>({CPU, CUDA})
      .kernel<&forward<true>>({Meta})
      .kernel(Autograd, not_differentiable());
  Definition(m,
             "route_topk_backward(Tensor? grad_gates, Tensor? grad_prob_sum, Tensor? grad_plogp_sum, Tensor? "
             "grad_logsumexp_sq_sum, Tensor? grad_logits, " +
                 network +
                 "str order, float scale, Tensor expert_ids, Tensor logits, Tensor hidden, bool[] wanted) -> Tensor[]")
      .kernel<&backward<false>>({CPU, CUDA})
      .kernel<&backward<true>>({Meta})
      .kernel(Autograd, not_differentiable());
}

}  // namespace mfx
