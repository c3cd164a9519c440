// route_topk: gate network, softmax over the experts, top-k and the sums that routing losses are made of.
//
//   logits [T, E] = x                                            kLogits
//                 = x W^T                                        kLinear, W [E, D]
//                 = gelu(x V^T + b) W^T                          kMlp, V [G, D], b [G], W [E, G], erf GELU
//                 = normalize(x V^T) W^T                         kGmm, V [G, D], W [E, G]
//
// "Result type" below is float, and double where x is double. Everything between x and the results is computed in it.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

enum class RouterGate : std::uint8_t { kLogits, kLinear, kMlp, kGmm };

// Whether there is a V before W.
constexpr bool has_hidden_layer(RouterGate gate) {
  return gate == RouterGate::kMlp || gate == RouterGate::kGmm;
}

inline constexpr double kRouterNormFloor = 1e-12;     // of |x V^T|, as torch.nn.functional.normalize
inline constexpr double kRouterSamplingFloor = 1e-6;  // added to p where experts are sampled
inline constexpr double kRouterSumFloor = 1e-20;      // added to the sum of sigmoids that gates are divided by

enum class RouterOrder : std::uint8_t {
  kSoftmaxTopK,              // gates are the chosen experts' share of the softmax over all experts, not renormalised
  kTopKSoftmax,              // gates are the softmax over the chosen experts' logits
  kSigmoidTopK,              // gates are the sigmoids of the chosen experts' logits
  kSigmoidTopKRenormalised,  // the same, divided by their sum (+ kRouterSumFloor)
};

// Whether an expert's score is the sigmoid of its logit; else it is its share of the softmax over all experts.
constexpr bool scores_are_sigmoids(RouterOrder order) {
  return order == RouterOrder::kSigmoidTopK || order == RouterOrder::kSigmoidTopKRenormalised;
}

// Which experts a token may have, and by what they are ranked.
struct RouterRanking {
  // [E] result type: experts are ranked by score + bias, where there is one or some groups are left out; else by logit.
  const void* bias = nullptr;
  // Consecutive groups of E / num_groups experts. Those of the top_groups best are left, a group being as good as the
  // sum of its scored_per_group (1 or 2) largest score + bias.
  std::int64_t num_groups = 1, top_groups = 1, scored_per_group = 1;

  constexpr bool leaves_groups_out() const { return top_groups < num_groups; }
  constexpr bool by_score() const { return bias != nullptr || leaves_groups_out(); }
};

// The gate network and its input. Double goes with double only; the other types may be mixed.
struct RouterGateParams {
  RouterGate gate;
  std::int64_t num_tokens;   // T
  std::int64_t dim;          // D (kLogits: E)
  std::int64_t hidden_dim;   // G (kLogits, kLinear: 0)
  std::int64_t num_experts;  // E
  const void* x;             // [T, D]
  DType x_dtype;
  const void* hidden_weight;  // V
  DType hidden_weight_dtype;
  const void* hidden_bias;       // b, result type
  std::int64_t num_segments;     // W in consecutive pieces along E
  const void* const* segments;   // [E_i, D or G] each
  const std::int64_t* num_rows;  // E_i
  DType weight_dtype;
};

struct RouteTopKParams {
  RouterGateParams network;
  std::int64_t k;
  RouterOrder order;
  RouterRanking ranking;
  double scale = 1;  // of the gates
  // Of the k, this many come last and are sampled: those of the remaining experts with the largest
  // (p + floor) / noise, which for noise drawn from Exp(1) is sampling without replacement in proportion to p + floor.
  std::int64_t num_sampled;
  const void* noise;  // [T, E], result type
  // Results. Experts are ranked with NaN first and the lower index first among equals, groups likewise.
  void* gates;                // [T, k]
  std::int32_t* expert_ids;   // [T, k]
  void* prob_sum;             // [E] sum over t of p
  void* plogp_sum;            // [] sum over t and e of p log p
  void* logsumexp_sq_sum;     // [] sum over t of logsumexp(logits)^2
  std::int32_t* counts;       // [E]
  void* logits;               // [T, E]
  void* hidden;               // [T, G] x V^T + b for the backward pass, or null
  void* workspace = nullptr;  // CUDA only, as in the backward pass
};

struct RouteTopKBackwardParams {
  RouterGateParams network;
  std::int64_t k;
  RouterOrder order;
  double scale = 1;
  const void* logits;  // of the forward pass, as the next two
  const void* hidden;
  const std::int32_t* expert_ids;  // checked on the CPU: an error, with nothing written, outside [0, num_experts)
  // Gradients of the results, result type; null stands for zero.
  const void* grad_gates;
  const void* grad_prob_sum;
  const void* grad_plogp_sum;
  const void* grad_logsumexp_sq_sum;
  const void* grad_logits;
  // Gradients wanted, each of its input's type (grad_hidden_bias: result type); null where not wanted.
  void* grad_x;
  void* grad_hidden_weight;
  void* grad_hidden_bias;
  void* const* grad_segments;  // one per segment
  void* workspace = nullptr;
};

// Sums over tokens are taken tile by tile in a fixed order: the same bits for every number of threads.
Status route_topk_cpu(const RouteTopKParams& params);
Status route_topk_backward_cpu(const RouteTopKBackwardParams& params);

// CUDA: no float64, at most 32 segments; fixed order of summation as well. expert_ids stay on the device and are
// trusted.
extern "C" {
Status mfx_route_topk_cuda(const RouteTopKParams& params, Stream stream);
std::int64_t mfx_route_topk_cuda_workspace(const RouteTopKParams& params);
Status mfx_route_topk_backward_cuda(const RouteTopKBackwardParams& params, Stream stream);
std::int64_t mfx_route_topk_backward_cuda_workspace(const RouteTopKBackwardParams& params);
}

}  // namespace mfx
