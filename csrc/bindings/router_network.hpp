// The gate network of a router: its tensors, checked, and as the params struct that kernels take.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <string>
#include <string_view>
#include <vector>

#include "bindings/checks.hpp"
#include "moduleformer_ext/route_topk.hpp"

namespace mfx {

inline RouterGate parse_gate(std::string_view gate) {
  if (gate == "logits") return RouterGate::kLogits;
  if (gate == "linear") return RouterGate::kLinear;
  if (gate == "mlp") return RouterGate::kMlp;
  if (gate == "gmm") return RouterGate::kGmm;
  MFX_CHECK_ARG(false, "route_topk", "gate", "be 'logits', 'linear', 'mlp' or 'gmm'", "'", gate, "'");
}

// The Python function that the messages name.
inline const char* op_name(RouterGate gate) {
  constexpr const char* kNames[] = {"route_topk", "route_topk_linear", "route_topk_mlp", "route_topk_gmm"};
  return kNames[static_cast<int>(gate)];
}

inline RouterOrder parse_router_order(const char* op, std::string_view order) {
  if (order == "softmax_topk") return RouterOrder::kSoftmaxTopK;
  if (order == "topk_softmax") return RouterOrder::kTopKSoftmax;
  if (order == "sigmoid_topk") return RouterOrder::kSigmoidTopK;
  if (order == "sigmoid_topk_renormalised") return RouterOrder::kSigmoidTopKRenormalised;
  MFX_CHECK_ARG(false, op, "order", "be 'softmax_topk', 'topk_softmax', 'sigmoid_topk' or 'sigmoid_topk_renormalised'",
                "'", order, "'");
}

inline void check_k(const char* op, int64_t k, const c10::SymInt& num_experts) {
  MFX_CHECK_ARG(k >= 1 && num_experts >= k, op, "k", c10::str("be in [1, ", num_experts, "] (the number of experts)"),
                k);
}

// What every op of the router takes for its gate network. Sizes may be symbolic.
struct Network {
  at::Tensor x;
  std::string gate;
  OptionalTensor hidden_weight, hidden_bias;
  std::vector<at::Tensor> weight;

  RouterGate kind() const { return parse_gate(gate); }
  const char* op() const { return op_name(kind()); }

  void check() const {
    const char* x_name = kind() == RouterGate::kLogits ? "logits" : "x";
    check_dim(op(), x_name, x, 2);
    check_float_dtype(op(), x_name, x);
    MFX_CHECK_ARG(x.sym_size(1) >= 1, op(), x_name, "have at least one column", "shape ", x.sym_sizes());
    check_parameters(op(), kind() == RouterGate::kGmm ? "centroids" : "weight");
  }

  // Beside x [..., D]; `weight_name` is what the op calls the rows of the experts.
  void check_parameters(const char* op, const char* weight_name) const {
    MFX_CHECK_ARG(hidden_weight.has_value() == has_hidden_layer(kind()), op, "hidden_weight",
                  "be given with the mlp and gmm gates alone", hidden_weight.has_value() ? "one" : "none");
    MFX_CHECK_ARG(hidden_bias.has_value() == (kind() == RouterGate::kMlp), op, "hidden_bias",
                  "be given with the mlp gate alone", hidden_bias.has_value() ? "one" : "none");
    if (hidden_weight.has_value()) {
      check_parameter(op, "hidden_weight", *hidden_weight, 2);
      check_columns(op, "hidden_weight", *hidden_weight, "D", x.sym_size(-1));
      MFX_CHECK_ARG(hidden_dim() >= 1, op, "hidden_weight", "have at least one row", "shape ",
                    hidden_weight->sym_sizes());
    }
    if (hidden_bias.has_value()) {
      check_parameter(op, "hidden_bias", *hidden_bias, 1);
      MFX_CHECK_ARG(hidden_bias->sym_size(0) == hidden_dim(), op, "hidden_bias",
                    c10::str("have shape [G] with G = ", hidden_dim(), " rows of hidden_weight"), "shape ",
                    hidden_bias->sym_sizes());
    }
    if (kind() == RouterGate::kLogits) {
      MFX_CHECK_ARG(weight.empty(), op, "weight", "be empty for logits", weight.size(), " segments");
      return;
    }
    MFX_CHECK_ARG(!weight.empty(), op, weight_name, "have at least one segment", "none");
    for (const at::Tensor& segment : weight) {
      check_parameter(op, weight_name, segment, 2);
      check_same_dtype(op, weight_name, segment, "its first segment", weight[0]);
      check_columns(op, weight_name, segment, hidden_weight.has_value() ? "G" : "D",
                    hidden_weight.has_value() ? hidden_dim() : x.sym_size(-1));
    }
    MFX_CHECK_ARG(num_experts() >= 1, op, weight_name, "have at least one row (expert)", "none");
  }

  c10::SymInt hidden_dim() const { return hidden_weight.has_value() ? hidden_weight->sym_size(0) : c10::SymInt(0); }
  c10::SymInt num_experts() const {
    if (kind() == RouterGate::kLogits) return x.sym_size(1);
    c10::SymInt rows = 0;
    for (const at::Tensor& segment : weight) rows += segment.sym_size(0);
    return rows;
  }

  void check_parameter(const char* op, const char* name, const at::Tensor& tensor, int64_t dim) const {
    check_dim(op, name, tensor, dim);
    check_same_device(op, name, tensor, "x", x);
    check_float_dtype(op, name, tensor);
    MFX_CHECK_ARG((tensor.scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble), op, name,
                  c10::str("be float64 if and only if x is (", x.scalar_type(), ")"), tensor.scalar_type());
  }
  static void check_columns(const char* op, const char* name, const at::Tensor& tensor, const char* letter,
                            const c10::SymInt& columns) {
    MFX_CHECK_ARG(tensor.sym_size(1) == columns, op, name, c10::str("have ", letter, " = ", columns, " columns"),
                  "shape ", tensor.sym_sizes());
  }
};

// The fields of RouteTopK, in order.
inline std::vector<at::Tensor> allocate_route(const Network& network, const c10::SymInt& tokens, int64_t k) {
  const auto real = network.x.options().dtype(result_type(network.x));
  const auto integer = network.x.options().dtype(at::kInt);
  const c10::SymInt experts = network.num_experts();
  return {at::empty_symint({tokens, k}, real),
          at::empty_symint({tokens, k}, integer),
          at::empty_symint({experts}, real),
          at::empty({}, real),
          at::empty({}, real),
          at::empty_symint({experts}, integer),
          at::empty_symint({tokens, experts}, real)};
}

// Keeps contiguous copies alive while their pointers are in use.
class NetworkParams {
 public:
  explicit NetworkParams(const Network& network) : NetworkParams(network, network.x) {}
  // For other tokens [..., D] than the network's own.
  NetworkParams(const Network& network, const at::Tensor& x) {
    const auto keep = [this](const at::Tensor& tensor) { return kept_.emplace_back(tensor).const_data_ptr(); };
    params_.gate = network.kind();
    params_.dim = x.size(-1);
    params_.num_tokens = x.numel() / params_.dim;
    params_.num_experts = network.num_experts().expect_int();
    params_.x = keep(x.contiguous());
    params_.x_dtype = check_float_dtype(network.op(), "x", x);
    if (network.hidden_weight.has_value()) {
      params_.hidden_dim = network.hidden_weight->size(0);
      params_.hidden_weight = keep(network.hidden_weight->contiguous());
      params_.hidden_weight_dtype = check_float_dtype(network.op(), "hidden_weight", *network.hidden_weight);
    }
    if (network.hidden_bias.has_value()) {
      params_.hidden_bias = keep(network.hidden_bias->to(result_type(x)).contiguous());
    }
    for (const at::Tensor& segment : network.weight) {
      segments_.push_back(keep(segment.contiguous()));
      num_rows_.push_back(segment.size(0));
      params_.weight_dtype = check_float_dtype(network.op(), "weight", segment);
    }
    params_.num_segments = static_cast<int64_t>(segments_.size());
    params_.segments = segments_.data();
    params_.num_rows = num_rows_.data();
  }
  NetworkParams(const NetworkParams&) = delete;
  NetworkParams& operator=(const NetworkParams&) = delete;

  const RouterGateParams& get() const { return params_; }

 private:
  RouterGateParams params_{};
  std::vector<at::Tensor> kept_;
  std::vector<const void*> segments_;
  std::vector<int64_t> num_rows_;
};

}  // namespace mfx
