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

// The k experts of a token: the best by logit, then those sampled from the rest.
__device__ inline void choose(const float* logits, std::int64_t num_experts, const Softmax& p, const float* noise,
                              std::int64_t k, std::int64_t num_sampled, std::int32_t* ids) {
  const std::int64_t num_best = k - num_sampled;
  largest_keys(num_experts, num_best, ids, [&](std::int64_t e) { return rank_key(logits[e], e); });
  if (num_sampled == 0) return;
  largest_keys(num_experts, num_sampled, ids + num_best, [&](std::int64_t e) {
    for (std::int64_t j = 0; j < num_best; ++j) {
      if (ids[j] == e) return std::int64_t{0};
    }
    return rank_key((p.prob(logits[e]) + static_cast<float>(kRouterSamplingFloor)) / noise[e], e);
  });
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

  template <typename Write>
  __device__ void compute(Write write) const {
    const Softmax all = softmax(num_experts, [&](std::int64_t e) { return logits[e]; });
    const bool gates_are_p = order == RouterOrder::kSoftmaxTopK;
    const auto chosen_logit = [&](std::int64_t j) { return logits[ids[j]]; };
    // Gates that are a softmax of their own add p' (d gate - sum p' d gate) to their experts' logits.
    Softmax chosen = {};
    float chosen_mean = 0.0f;
    if (grad_gates != nullptr && !gates_are_p) {
      chosen = softmax(k, chosen_logit);
      for (std::int64_t j = 0; j < k; ++j) chosen_mean += chosen.prob(chosen_logit(j)) * grad_gates[j];
    }
    const auto grad_gate = [&](std::int64_t e) {
      for (std::int64_t j = 0; grad_gates != nullptr && j < k; ++j) {
        if (ids[j] == e) return gates_are_p ? grad_gates[j] : chosen.prob(logits[e]) * (grad_gates[j] - chosen_mean);
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
