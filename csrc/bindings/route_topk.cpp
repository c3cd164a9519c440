// route_topk          the op: forward results only
// route_topk_forward  the same and what the backward needs (the hidden layer before its nonlinearity)
// route_topk_backward the gradients that are wanted, in the order x, hidden_weight, hidden_bias, segments of weight
#include "moduleformer_ext/route_topk.hpp"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/router_network.hpp"

namespace mfx {
namespace {

using at::Tensor;
// gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ResultsAndHidden = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RouterOrder parse_order(const char* op, std::string_view order) {
  if (order == "softmax_topk") return RouterOrder::kSoftmaxTopK;
  if (order == "topk_softmax") return RouterOrder::kTopKSoftmax;
  MFX_CHECK_ARG(false, op, "order", "be 'softmax_topk' or 'topk_softmax'", "'", order, "'");
}

void check_choice(const Network& network, int64_t k, std::string_view order, const OptionalTensor& noise,
                  int64_t num_sampled) {
  const auto num_experts = network.num_experts();
  MFX_CHECK_ARG(k >= 1 && num_experts >= k, network.op, "k",
                c10::str("be in [1, ", num_experts, "] (the number of experts)"), k);
  parse_order(network.op, order);
  MFX_CHECK_ARG(num_sampled >= 0 && num_sampled <= k, network.op, "num_sampled", c10::str("be in [0, ", k, "] (k)"),
                num_sampled);
  MFX_CHECK_ARG(noise.has_value() == (num_sampled > 0), network.op, "noise",
                c10::str("be given if and only if num_sampled > 0 (it is ", num_sampled, ")"),
                noise.has_value() ? "one" : "none");
  if (!noise.has_value()) return;
  check_dim(network.op, "noise", *noise, 2);
  check_float_dtype(network.op, "noise", *noise);
  check_same_device(network.op, "noise", *noise, "x", network.x);
  MFX_CHECK_ARG(noise->sym_size(0) == network.x.sym_size(0) && noise->sym_size(1) == num_experts, network.op, "noise",
                c10::str("have shape [T, E] = [", network.x.sym_size(0), ", ", num_experts, "]"), "shape ",
                noise->sym_sizes());
}

ResultsAndHidden allocate(const Network& network, int64_t k, bool save_hidden) {
  const auto real = network.x.options().dtype(result_type(network.x));
  const auto integer = network.x.options().dtype(at::kInt);
  const auto tokens = network.x.sym_size(0), experts = network.num_experts();
  const bool hidden = save_hidden && has_hidden_layer(network.gate);
  return {at::empty_symint({tokens, k}, real),
          at::empty_symint({tokens, k}, integer),
          at::empty_symint({experts}, real),
          at::empty({}, real),
          at::empty({}, real),
          at::empty_symint({experts}, integer),
          at::empty_symint({tokens, experts}, real),
          hidden ? at::empty_symint({tokens, network.hidden_dim()}, real) : at::empty({0}, real)};
}

ResultsAndHidden forward_meta(const Tensor& x, std::string_view gate, const OptionalTensor& hidden_weight,
                              const OptionalTensor& hidden_bias, at::TensorList weight, int64_t k,
                              std::string_view order, const OptionalTensor& noise, int64_t num_sampled,
                              bool save_hidden) {
  const Network network(x, gate, hidden_weight, hidden_bias, weight);
  check_choice(network, k, order, noise, num_sampled);
  return allocate(network, k, save_hidden);
}

ResultsAndHidden forward(const Tensor& x, std::string_view gate, const OptionalTensor& hidden_weight,
                         const OptionalTensor& hidden_bias, at::TensorList weight, int64_t k, std::string_view order,
                         const OptionalTensor& noise, int64_t num_sampled, bool save_hidden) {
  const Network network(x, gate, hidden_weight, hidden_bias, weight);
  check_choice(network, k, order, noise, num_sampled);
  const Backend backend = backend_of(network.op, "x", x);
  MFX_CHECK_ARG(x.size(0) <= std::numeric_limits<int32_t>::max() / k, network.op, "x",
                "have fewer than 2^31 slots (tokens times k)", "shape ", x.sizes());
  const NetworkParams params(network);
  const Tensor noise_values = noise.has_value() ? noise->to(result_type(x)).contiguous() : Tensor();
  ResultsAndHidden results = allocate(network, k, save_hidden);
  auto& [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] = results;
  const RouteTopKParams call = {
      .network = params.get(),
      .k = k,
      .order = parse_order(network.op, order),
      .num_sampled = num_sampled,
      .noise = noise.has_value() ? noise_values.const_data_ptr() : nullptr,
      .gates = gates.mutable_data_ptr(),
      .expert_ids = expert_ids.mutable_data_ptr<int32_t>(),
      .prob_sum = prob_sum.mutable_data_ptr(),
      .plogp_sum = plogp_sum.mutable_data_ptr(),
      .logsumexp_sq_sum = logsumexp_sq_sum.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .logits = logits.mutable_data_ptr(),
      .hidden = save_hidden && has_hidden_layer(network.gate) ? hidden.mutable_data_ptr() : nullptr,
  };
  switch (backend) {
    case Backend::kCpu: check_status(network.op, route_topk_cpu(call)); break;
    case Backend::kCuda:
      launch_cuda(network.op, {x, logits, gates}, call, MFX_CUDA_FUNCTION(mfx_route_topk_cuda),
                  MFX_CUDA_FUNCTION(mfx_route_topk_cuda_workspace));
      break;
  }
  return results;
}

Results without_hidden(ResultsAndHidden results) {
  auto& [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] = results;
  return {gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits};
}

template <auto kForward>
Results route_topk(const Tensor& x, std::string_view gate, const OptionalTensor& hidden_weight,
                   const OptionalTensor& hidden_bias, at::TensorList weight, int64_t k, std::string_view order,
                   const OptionalTensor& noise, int64_t num_sampled) {
  return without_hidden(
      kForward(x, gate, hidden_weight, hidden_bias, weight, k, order, noise, num_sampled, /*save_hidden=*/false));
}

// What the forward pass returned, and gradients of that.
struct Saved {
  const OptionalTensor &grad_gates, &grad_prob_sum, &grad_plogp_sum, &grad_logsumexp_sq_sum, &grad_logits;
  const Tensor &expert_ids, &logits, &hidden;

  void check(const Network& network) const {
    check_dim(network.op, "expert_ids", expert_ids, 2);
    const auto tokens = network.x.sym_size(0), experts = network.num_experts(), k = expert_ids.sym_size(1);
    MFX_CHECK_ARG(expert_ids.sym_size(0) == tokens && k >= 1 && k <= experts, network.op, "expert_ids",
                  c10::str("have shape [T, k] with T = ", tokens, " and k in [1, ", experts, "]"), "shape ",
                  expert_ids.sym_sizes());
    check_dtype(network.op, "expert_ids", expert_ids, at::kInt);
    check_same_device(network.op, "expert_ids", expert_ids, "x", network.x);
    const auto check_result = [&](const char* name, const OptionalTensor& tensor, at::SymIntArrayRef shape) {
      if (!tensor.has_value()) return;
      check_tensor(network.op, name, *tensor, shape, result_type(network.x), "x", network.x);
    };
    check_result("logits", logits, {tokens, experts});
    if (has_hidden_layer(network.gate)) {
      check_result("hidden", hidden, {tokens, network.hidden_dim()});
    } else {
      check_result("hidden", hidden, {0});
    }
    check_result("grad_gates", grad_gates, {tokens, k});
    check_result("grad_prob_sum", grad_prob_sum, {experts});
    check_result("grad_plogp_sum", grad_plogp_sum, {});
    check_result("grad_logsumexp_sq_sum", grad_logsumexp_sq_sum, {});
    check_result("grad_logits", grad_logits, {tokens, experts});
  }
};

// One per wanted input, in order; `wanted` has a flag for x, hidden_weight, hidden_bias and each segment.
std::vector<Tensor> allocate_gradients(const Network& network, const c10::List<bool>& wanted) {
  MFX_CHECK_ARG(wanted.size() == 3 + network.weight.size(), network.op, "wanted",
                c10::str("have ", 3 + network.weight.size(), " flags"), wanted.size());
  std::vector<Tensor> inputs = {network.x, network.hidden_weight.value_or(Tensor()),
                                network.hidden_bias.value_or(Tensor())};
  inputs.insert(inputs.end(), network.weight.begin(), network.weight.end());
  std::vector<Tensor> gradients;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    MFX_CHECK_ARG(!wanted[i] || inputs[i].defined(), network.op, "wanted", "be true for inputs that are there alone",
                  "true for input ", i);
    if (wanted[i]) gradients.push_back(at::empty_symint(inputs[i].sym_sizes(), inputs[i].options()));
  }
  return gradients;
}

std::vector<Tensor> backward_meta(const OptionalTensor& grad_gates, const OptionalTensor& grad_prob_sum,
                                  const OptionalTensor& grad_plogp_sum, const OptionalTensor& grad_logsumexp_sq_sum,
                                  const OptionalTensor& grad_logits, const Tensor& x, std::string_view gate,
                                  const OptionalTensor& hidden_weight, const OptionalTensor& hidden_bias,
                                  at::TensorList weight, std::string_view order, const Tensor& expert_ids,
                                  const Tensor& logits, const Tensor& hidden, const c10::List<bool>& wanted) {
  const Network network(x, gate, hidden_weight, hidden_bias, weight);
  Saved{grad_gates, grad_prob_sum, grad_plogp_sum, grad_logsumexp_sq_sum, grad_logits, expert_ids, logits, hidden}
      .check(network);
  parse_order(network.op, order);
  return allocate_gradients(network, wanted);
}

std::vector<Tensor> backward(const OptionalTensor& grad_gates, const OptionalTensor& grad_prob_sum,
                             const OptionalTensor& grad_plogp_sum, const OptionalTensor& grad_logsumexp_sq_sum,
                             const OptionalTensor& grad_logits, const Tensor& x, std::string_view gate,
                             const OptionalTensor& hidden_weight, const OptionalTensor& hidden_bias,
                             at::TensorList weight, std::string_view order, const Tensor& expert_ids,
                             const Tensor& logits, const Tensor& hidden, const c10::List<bool>& wanted) {
  const Network network(x, gate, hidden_weight, hidden_bias, weight);
  Saved{grad_gates, grad_prob_sum, grad_plogp_sum, grad_logsumexp_sq_sum, grad_logits, expert_ids, logits, hidden}
      .check(network);
  const RouterOrder parsed_order = parse_order(network.op, order);
  const Backend backend = backend_of(network.op, "x", x);
  const NetworkParams params(network);
  std::vector<Tensor> kept;
  const auto pointer = [&](const OptionalTensor& tensor) -> const void* {
    return tensor.has_value() ? kept.emplace_back(tensor->contiguous()).const_data_ptr() : nullptr;
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
  for (std::size_t i = 0; i < weight.size(); ++i) grad_segments.push_back(target(3 + i));
  const RouteTopKBackwardParams call = {
      .network = params.get(),
      .k = expert_ids.size(1),
      .order = parsed_order,
      .logits = pointer(logits),
      .hidden = pointer(hidden),
      .expert_ids = kept.emplace_back(expert_ids.contiguous()).const_data_ptr<int32_t>(),
      .grad_gates = pointer(grad_gates),
      .grad_prob_sum = pointer(grad_prob_sum),
      .grad_plogp_sum = pointer(grad_plogp_sum),
      .grad_logsumexp_sq_sum = pointer(grad_logsumexp_sq_sum),
      .grad_logits = pointer(grad_logits),
      .grad_x = grad_x,
      .grad_hidden_weight = grad_hidden_weight,
      .grad_hidden_bias = grad_hidden_bias,
      .grad_segments = grad_segments.data(),
  };
  switch (backend) {
    case Backend::kCpu: check_status(network.op, route_topk_backward_cpu(call)); break;
    case Backend::kCuda:
      launch_cuda(network.op, {x, logits, expert_ids}, call, MFX_CUDA_FUNCTION(mfx_route_topk_backward_cuda),
                  MFX_CUDA_FUNCTION(mfx_route_topk_backward_cuda_workspace));
      break;
  }
  if (wanted[2]) *bias_gradient = bias.to(hidden_bias->scalar_type());
  return gradients;
}

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("moduleformer_ext::route_topk_forward", "")
                             .typed<decltype(forward)>();
  return op;
}
const auto& results_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("moduleformer_ext::route_topk", "")
                             .typed<decltype(route_topk<forward>)>();
  return op;
}
const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("moduleformer_ext::route_topk_backward", "")
                             .typed<decltype(backward)>();
  return op;
}

class RouteTopKFunction : public torch::autograd::Function<RouteTopKFunction> {
 public:
  static std::vector<Tensor> forward(torch::autograd::AutogradContext* ctx, const Tensor& x, std::string_view gate,
                                     const OptionalTensor& hidden_weight, const OptionalTensor& hidden_bias,
                                     at::TensorList weight, int64_t k, std::string_view order,
                                     const OptionalTensor& noise, int64_t num_sampled) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits, hidden] = forward_op().call(
        x, gate, hidden_weight, hidden_bias, weight, k, order, noise, num_sampled, /*save_hidden=*/true);
    ctx->mark_non_differentiable({expert_ids, counts});
    ctx->set_materialize_grads(false);
    ctx->saved_data["gate"] = std::string(gate);
    ctx->saved_data["order"] = std::string(order);
    std::vector<Tensor> saved = {
        x, hidden_weight.value_or(Tensor()), hidden_bias.value_or(Tensor()), expert_ids, logits, hidden};
    saved.insert(saved.end(), weight.begin(), weight.end());
    ctx->save_for_backward(std::move(saved));
    return {gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits};
  }

  static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grads) {
    const std::vector<Tensor> saved = ctx->get_saved_variables();
    const std::vector<Tensor> weight(saved.begin() + kWeight, saved.end());
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const std::string gate = ctx->saved_data["gate"].toStringRef(), order = ctx->saved_data["order"].toStringRef();
    // needs_input_grad counts the tensors that were there.
    c10::List<bool> wanted;
    std::size_t input = 0;
    for (const std::size_t i : {kX, kHiddenWeight, kHiddenBias}) {
      wanted.push_back(saved[i].defined() && ctx->needs_input_grad(input++));
    }
    for (std::size_t i = 0; i < weight.size(); ++i) wanted.push_back(ctx->needs_input_grad(input++));

    const std::vector<Tensor> gradients = backward_op().call(
        optional(grads[0]), optional(grads[2]), optional(grads[3]), optional(grads[4]), optional(grads[6]), saved[kX],
        gate, optional(saved[kHiddenWeight]), optional(saved[kHiddenBias]), weight, order, saved[kExpertIds],
        saved[kLogits], saved[kHidden], wanted);
    // Gradients of x, gate, hidden_weight, hidden_bias, weight..., k, order, noise, num_sampled.
    auto next = gradients.begin();
    const auto gradient = [&](std::size_t i) { return wanted[i] ? *next++ : Tensor(); };
    std::vector<Tensor> all = {gradient(0), Tensor(), gradient(1), gradient(2)};
    for (std::size_t i = 0; i < weight.size(); ++i) all.push_back(gradient(3 + i));
    all.resize(all.size() + 4);
    return all;
  }

 private:
  static constexpr std::size_t kX = 0, kHiddenWeight = 1, kHiddenBias = 2, kExpertIds = 3, kLogits = 4, kHidden = 5,
                               kWeight = 6;
};

Results route_topk_autograd(const Tensor& x, std::string_view gate, const OptionalTensor& hidden_weight,
                            const OptionalTensor& hidden_bias, at::TensorList weight, int64_t k, std::string_view order,
                            const OptionalTensor& noise, int64_t num_sampled) {
  refuse_forward_mode(op_name(parse_gate(gate)), x, hidden_weight, hidden_bias, weight, noise);
  if (!records_grad(x, hidden_weight, hidden_bias, weight)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return results_op().call(x, gate, hidden_weight, hidden_bias, weight, k, order, noise, num_sampled);
  }
  const std::vector<Tensor> r =
      RouteTopKFunction::apply(x, gate, hidden_weight, hidden_bias, weight, k, order, noise, num_sampled);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

#define MFX_ROUTER_NETWORK "Tensor x, str gate, Tensor? hidden_weight, Tensor? hidden_bias, Tensor[] weight, "
#define MFX_ROUTER_CHOICE "int k, str order, Tensor? noise, int num_sampled"
#define MFX_ROUTER_RESULTS                                                                                       \
  "Tensor gates, Tensor expert_ids, Tensor prob_sum, Tensor plogp_sum, Tensor logsumexp_sq_sum, Tensor counts, " \
  "Tensor logits"

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  m.def("route_topk(" MFX_ROUTER_NETWORK MFX_ROUTER_CHOICE ") -> (" MFX_ROUTER_RESULTS ")",
        {at::Tag::pt2_compliant_tag});
  m.def("route_topk_forward(" MFX_ROUTER_NETWORK MFX_ROUTER_CHOICE ", bool save_hidden) -> (" MFX_ROUTER_RESULTS
        ", Tensor hidden)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "route_topk_backward(Tensor? grad_gates, Tensor? grad_prob_sum, Tensor? grad_plogp_sum, Tensor? "
      "grad_logsumexp_sq_sum, Tensor? grad_logits, " MFX_ROUTER_NETWORK
      "str order, Tensor expert_ids, Tensor logits, Tensor hidden, bool[] wanted) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CPU, m) {
  m.impl("route_topk", &route_topk<forward>);
  m.impl("route_topk_forward", &forward);
  m.impl("route_topk_backward", &backward);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CUDA, m) {
  m.impl("route_topk", &route_topk<forward>);
  m.impl("route_topk_forward", &forward);
  m.impl("route_topk_backward", &backward);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Meta, m) {
  m.impl("route_topk", &route_topk<forward_meta>);
  m.impl("route_topk_forward", &forward_meta);
  m.impl("route_topk_backward", &backward_meta);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Autograd, m) {
  m.impl("route_topk", &route_topk_autograd);
  m.impl("route_topk_forward", not_differentiable());
  m.impl("route_topk_backward", not_differentiable());
}
// Autocast falls through: whatever the types, products are summed and everything after them is computed in float.

}  // namespace mfx
