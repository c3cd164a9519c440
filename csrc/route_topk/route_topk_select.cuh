// Softmax, ranking and their derivative for one token by one warp. Lanes stride over the experts and read the logits
// again in every pass, from L1: any number of experts, no arrays. Every result is the same in all lanes.
#pragma once

#include <cstdint>

#include "moduleformer_ext/route_topk.hpp"
#include "tile/warp_reduce.cuh"

namespace mfx::router {

using device::lane_id;

// logsumexp = largest + log_sum, kept apart so that log p does not lose digits.
struct Softmax {
  float largest, inverse, log_sum;

  __device__ float prob(float logit) const { return expf(logit - largest) * inverse; }
  __device__ float logsumexp() const { return largest + log_sum; }
  // 0 where p is 0, so that p log p is 0 there even for a logit of -infinity.
  __device__ float log_prob(float logit, float prob) const { return prob == 0.0f ? 0.0f : (logit - largest) - log_sum; }
};

// Of value(i), i < n.
template <typename Value>
__device__ Softmax softmax(std::int64_t n, Value value) {
  float largest = -INFINITY, sum = 0.0f;
  for (std::int64_t i = lane_id(); i < n; i += device::kWarp) largest = fmaxf(largest, value(i));
  largest = device::lanes_max(largest);
  for (std::int64_t i = lane_id(); i < n; i += device::kWarp) sum += expf(value(i) - largest);
  sum = device::lanes_sum(sum);
  return {largest, 1.0f / sum, logf(sum)};
}

// Orders experts by value, NaN first, the two zeros equal, and the lower index first among equals: the larger, the
// earlier. Positive for every expert.
__device__ inline std::int64_t rank_key(float value, std::int64_t expert) {
  const std::int32_t bits = __float_as_int(value + 0.0f);
  const std::int32_t ordered = value == value ? bits ^ ((bits >> 31) & 0x7fffffff) : 0x7fffffff;
  const std::uint32_t unsigned_order = static_cast<std::uint32_t>(ordered) ^ 0x80000000u;
  return static_cast<std::int64_t>((static_cast<std::uint64_t>(unsigned_order) << 31) + (0x7fffffff - expert));
}

__device__ inline std::int64_t lanes_max(std::int64_t x) {
  for (int step = 1; step < device::kWarp; step *= 2) x = max(x, __shfl_xor_sync(device::kAllLanes, x, step));
  return x;
}

// ids[j], j < count: the experts of the largest key(e) in order, each found below the one before it.
template <typename Key>
__device__ void largest_keys(std::int64_t num_experts, std::int64_t count, std::int32_t* ids, Key key) {
  std::int64_t bound = INT64_MAX;
  for (std::int64_t j = 0; j < count; ++j) {
    std::int64_t best = 0;
    for (std::int64_t e = lane_id(); e < num_experts; e += device::kWarp) {
      const std::int64_t candidate = key(e);
      if (candidate < bound) best = max(best, candidate);
    }
    bound = lanes_max(best);
    if (lane_id() == 0) ids[j] = static_cast<std::int32_t>(0x7fffffff - (bound & 0x7fffffff));
  }
  __syncwarp();
}

struct Sigmoid {
  float value, slope;
};

// No digits are lost in either tail.
__device__ inline Sigmoid sigmoid(float x) {
  const float small = expf(-fabsf(x)), share = 1.0f / (1.0f + small);
  return {(x < 0.0f ? small : 1.0f) * share, small * share * share};
}

// What experts are ranked by where that is not the logit: scores [E] of a token, and group_keys [num_groups], those of
// the groups that are left out being 0.
__device__ inline void rank_scores(const RouterRanking& ranking, RouterOrder order, const float* logits,
                                   std::int64_t num_experts, const Softmax& p, float* scores,
                                   std::int64_t* group_keys) {
  const auto* bias = static_cast<const float*>(ranking.bias);
  for (std::int64_t e = lane_id(); e < num_experts; e += device::kWarp) {
    const float score = scores_are_sigmoids(order) ? sigmoid(logits[e]).value : p.prob(logits[e]);
    scores[e] = bias == nullptr ? score : score + bias[e];
  }
  __syncwarp();
  if (!ranking.leaves_groups_out()) return;
  const std::int64_t size = num_experts / ranking.num_groups;
  for (std::int64_t g = lane_id(); g < ranking.num_groups; g += device::kWarp) {
    const float* of_group = scores + g * size;
    std::int64_t best = rank_key(of_group[0], 0), second = 0;
    float sum = of_group[0], second_score = 0.0f;
#pragma unroll 1  // unrolled it spills registers
    for (std::int64_t e = 1; e < size; ++e) {
      const std::int64_t key = rank_key(of_group[e], e);
      if (key > best) {
        second = best;
        second_score = sum;
        best = key;
        sum = of_group[e];
      } else if (key > second) {
        second = key;
        second_score = of_group[e];
      }
    }
    if (ranking.scored_per_group == 2) sum += second_score;
    group_keys[g] = rank_key(sum, g);
  }
  __syncwarp();
  std::int64_t bound = INT64_MAX;  // becomes the key of the last group that is left
  for (std::int64_t j = 0; j < ranking.top_groups; ++j) {
    std::int64_t best = 0;
    for (std::int64_t g = lane_id(); g < ranking.num_groups; g += device::kWarp) {
      if (group_keys[g] < bound) best = max(best, group_keys[g]);
    }
    bound = lanes_max(best);
  }
  for (std::int64_t g = lane_id(); g < ranking.num_groups; g += device::kWarp) {
    if (group_keys[g] < bound) group_keys[g] = 0;
  }
  __syncwarp();
}

// The k experts of a token: the best by what they are ranked by, then those sampled from the rest. group_keys: null, or
// of size experts each, 0 where they are not to be chosen.
__device__ inline void choose(const float* ranked, const std::int64_t* group_keys, std::int64_t size,
                              const float* logits, std::int64_t num_experts, const Softmax& p, const float* noise,
                              std::int64_t k, std::int64_t num_sampled, std::int32_t* ids) {
  const std::int64_t num_best = k - num_sampled;
  largest_keys(num_experts, num_best, ids, [&](std::int64_t e) {
    return group_keys != nullptr && group_keys[e / size] == 0 ? std::int64_t{0} : rank_key(ranked[e], e);
  });
  if (num_sampled == 0) return;
  largest_keys(num_experts, num_sampled, ids + num_best, [&](std::int64_t e) {
    for (std::int64_t j = 0; j < num_best; ++j) {
      if (ids[j] == e) return std::int64_t{0};
    }
    return rank_key((p.prob(logits[e]) + static_cast<float>(kRouterSamplingFloor)) / noise[e], e);
  });
}

// The gates of a token's choices, before they are scaled.
struct ChosenGates {
  RouterOrder order;
  Softmax softmax;           // over all experts, or over the choices
  float inverse_sum = 1.0f;  // of sigmoids

  __device__ float gate(float logit) const {
    return scores_are_sigmoids(order) ? sigmoid(logit).value * inverse_sum : softmax.prob(logit);
  }
  // How much a gate grows with its own logit where the sum that it shares with others stays; of kSoftmaxTopK unused.
  __device__ float slope(float logit) const {
    return scores_are_sigmoids(order) ? sigmoid(logit).slope * inverse_sum : softmax.prob(logit);
  }
};

__device__ inline ChosenGates chosen_gates(RouterOrder order, const Softmax& all, const float* logits,
                                           const std::int32_t* ids, std::int64_t k) {
  ChosenGates gates = {order, all};
  if (order == RouterOrder::kTopKSoftmax) {
    gates.softmax = softmax(k, [&](std::int64_t j) { return logits[ids[j]]; });
  } else if (order == RouterOrder::kSigmoidTopKRenormalised) {
    float sum = 0.0f;
    for (std::int64_t j = lane_id(); j < k; j += device::kWarp) sum += sigmoid(logits[ids[j]]).value;
    gates.inverse_sum = 1.0f / (device::lanes_sum(sum) + static_cast<float>(kRouterSumFloor));
  }
  return gates;
}

// d loss / d logits of a token; write(e, value) for every expert.
struct LogitGradient {
  const float* logits;  // [E] of the token
  const std::int32_t* ids;
  const float* grad_gates;   // [k] of the token, or null, as those below
  const float* grad_logits;  // [E] of the token
  const float* grad_prob_sum;
  float plogp, square;  // d plogp_sum, d logsumexp_sq_sum
  std::int64_t num_experts, k;
  RouterOrder order;
  float scale;

  template <typename Write>
  __device__ void compute(Write write) const {
    const Softmax all = softmax(num_experts, [&](std::int64_t e) { return logits[e]; });
    const bool gates_are_p = order == RouterOrder::kSoftmaxTopK;
    // Other gates have a derivative of their own: slope (d gate - sum over the choices of gate d gate).
    ChosenGates chosen = {};
    float chosen_mean = 0.0f;
    if (grad_gates != nullptr && !gates_are_p) {
      chosen = chosen_gates(order, all, logits, ids, k);
      for (std::int64_t j = 0; order != RouterOrder::kSigmoidTopK && j < k; ++j) {
        chosen_mean += chosen.gate(logits[ids[j]]) * grad_gates[j];
      }
    }
    const auto grad_gate = [&](std::int64_t e) {
      for (std::int64_t j = 0; grad_gates != nullptr && j < k; ++j) {
        if (ids[j] != e) continue;
        return scale * (gates_are_p ? grad_gates[j] : chosen.slope(logits[e]) * (grad_gates[j] - chosen_mean));
      }
      return 0.0f;
    };
    // d loss / d p. The derivative of p log p is log p + 1; the one vanishes in the softmax.
    const auto grad_prob = [&](std::int64_t e, float prob) {
      float grad = grad_prob_sum == nullptr ? 0.0f : grad_prob_sum[e];
      if (plogp != 0.0f) grad += plogp * all.log_prob(logits[e], prob);
      return gates_are_p ? grad + grad_gate(e) : grad;
    };
    float mean = 0.0f;
    for (std::int64_t e = lane_id(); e < num_experts; e += device::kWarp) {
      const float prob = all.prob(logits[e]);
      mean += prob * grad_prob(e, prob);
    }
    const float shift = 2.0f * square * all.logsumexp() - device::lanes_sum(mean);
    for (std::int64_t e = lane_id(); e < num_experts; e += device::kWarp) {
      const float prob = all.prob(logits[e]);
      float grad = prob * (grad_prob(e, prob) + shift) + (grad_logits == nullptr ? 0.0f : grad_logits[e]);
      if (!gates_are_p) grad += grad_gate(e);
      write(e, grad);
    }
  }
};

}  // namespace mfx::router
