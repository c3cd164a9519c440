// Two launches: blocks of 16 or 32 tokens go from x to the choices and leave their sums behind, then these are added in
// order. Between its stages a block passes z and the logits through global memory, which is to say through L1 and L2,
// so that nothing limits the number of experts or the size of the hidden layer.
//
//   z = x V^T (+ b),  h = gelu(z) | z / |z|,  logits = h W^T;  linear: logits = x W^T
#include <cuda_runtime.h>

#include "route_topk/route_topk_launch.cuh"
#include "route_topk/route_topk_select.cuh"

namespace mfx::router {

struct Forward : RouteTopKParams {
  ExpertRows experts;
  std::int64_t num_tiles;
  float* activated;          // [T, G] gelu(z), kMlp alone
  float* z;                  // [T, G], where it is saved or kGmm
  float* scales;             // [T] of z, kGmm alone
  float* scores;             // [T, E], where experts are ranked by score
  std::int64_t* group_keys;  // [T, groups], where some are left out
  // Per tile: sums of p per expert, of p log p and of logsumexp^2; slots per expert.
  float* tile_sums;           // [tiles, E + 2]
  std::int32_t* tile_counts;  // [tiles, E]
};

template <typename Op, typename Tiles>
__device__ void compute_logits(const Forward& p, std::int64_t first, std::int64_t end) {
  __shared__ alignas(1024) char memory[Tiles::kBytes];
  const device::SharedAddress tiles = device::shared_address(memory);
  const RouterGateParams& n = p.network;
  const std::int64_t experts = n.num_experts;
  const auto write_logits = [&](std::int64_t token, std::int64_t e, float x, float y, bool both) {
    store_pair(floats(p.logits) + token * experts + e, x, y, both);
  };
  if (n.gate == RouterGate::kLogits) {
    for (std::int64_t i = first * experts + threadIdx.x; i < end * experts; i += kThreads) {
      floats(p.logits)[i] = load(n.x, n.x_dtype, i);
    }
    __syncthreads();
    return;
  }
  const RowMatrix x = {n.x, n.x_dtype, n.dim};
  if (n.gate == RouterGate::kLinear) {  // x W^T
    const ExpertMatrix<device::Major::kK> weight(p.experts, n.dim);
    product_rows<Op, typename Tiles::Narrow>(tiles, x, weight, first, end, experts, n.dim, write_logits);
    __syncthreads();
    return;
  }
  const bool is_mlp = n.gate == RouterGate::kMlp;  // z = x V^T + b, then h W^T; of kGmm rows are scaled last
  const auto write_hidden = [&](std::int64_t token, std::int64_t g, float x, float y, bool both) {
    const std::int64_t at = token * n.hidden_dim + g;
    if (is_mlp) {
      x += floats(n.hidden_bias)[g];
      if (both) y += floats(n.hidden_bias)[g + 1];
      store_pair(p.activated + at, Gelu(x).value, Gelu(y).value, both);
    }
    if (p.z != nullptr) store_pair(p.z + at, x, y, both);
  };
  product_rows<Op, typename Tiles::Wide>(tiles, x, RowMatrix{n.hidden_weight, n.hidden_weight_dtype, n.dim}, first, end,
                                         n.hidden_dim, n.dim, write_hidden);
  __syncthreads();
  if (!is_mlp) {
    for_each_token(first, end, [&](std::int64_t token) {
      const float scale = inverse_norm(p.z + token * n.hidden_dim, n.hidden_dim);
      if (lane_id() == 0) p.scales[token] = scale;
    });
    __syncthreads();
  }
  product_rows<float, typename Tiles::Narrow>(
      tiles, RowMatrix{is_mlp ? p.activated : p.z, DType::kFloat32, n.hidden_dim},
      ExpertMatrix<device::Major::kK>{p.experts, n.hidden_dim}, first, end, experts, n.hidden_dim,
      [&](std::int64_t token, std::int64_t e, float x, float y, bool both) {
        const float scale = is_mlp ? 1.0f : p.scales[token];
        write_logits(token, e, x * scale, y * scale, both);
      });
  __syncthreads();
}

struct TokenSums {
  float largest, inverse, plogp, square;
};

// Choices and gates of one token by one warp.
__device__ TokenSums route_token(const Forward& p, std::int64_t token) {
  const std::int64_t experts = p.network.num_experts;
  const float* logits = floats(p.logits) + token * experts;
  std::int32_t* ids = p.expert_ids + token * p.k;
  const Softmax all = softmax(experts, [&](std::int64_t e) { return logits[e]; });
  const RouterRanking& ranking = p.ranking;
  const float* ranked = logits;
  std::int64_t* group_keys = ranking.leaves_groups_out() ? p.group_keys + token * ranking.num_groups : nullptr;
  if (ranking.by_score()) {
    float* scores = p.scores + token * experts;
    rank_scores(ranking, p.order, logits, experts, all, scores, group_keys);
    ranked = scores;
  }
  choose(ranked, group_keys, experts / ranking.num_groups, logits, experts, all,
         p.noise == nullptr ? nullptr : floats(p.noise) + token * experts, p.k, p.num_sampled, ids);

  const ChosenGates chosen = chosen_gates(p.order, all, logits, ids, p.k);
  for (std::int64_t j = lane_id(); j < p.k; j += device::kWarp) {
    floats(p.gates)[token * p.k + j] = chosen.gate(logits[ids[j]]) * static_cast<float>(p.scale);
  }
  float plogp = 0.0f;
  for (std::int64_t e = lane_id(); e < experts; e += device::kWarp) {
    const float prob = all.prob(logits[e]);
    plogp += prob * all.log_prob(logits[e], prob);
  }
  return {all.largest, all.inverse, device::lanes_sum(plogp), all.logsumexp() * all.logsumexp()};
}

template <typename Op, typename Tiles>
__global__ void __launch_bounds__(kThreads, Tiles::Wide::kBlocksPerSm)
    route_topk_forward(const __grid_constant__ Forward p) {
  __shared__ TokenSums tokens[Tiles::kTokens];
  const std::int64_t experts = p.network.num_experts;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * Tiles::kTokens;
  const std::int64_t end = min(first + Tiles::kTokens, p.network.num_tokens);
  compute_logits<Op, Tiles>(p, first, end);
  for_each_token(first, end, [&](std::int64_t token) {
    const TokenSums sums = route_token(p, token);
    if (lane_id() == 0) tokens[token - first] = sums;
  });
  __syncthreads();

  float* sums = p.tile_sums + blockIdx.x * (experts + 2);
  for (std::int64_t e = threadIdx.x; e < experts; e += kThreads) {
    float prob = 0.0f;
    std::int32_t count = 0;
    for (std::int64_t token = first; token < end; ++token) {
      const TokenSums& t = tokens[token - first];
      prob += Softmax{t.largest, t.inverse, 0.0f}.prob(floats(p.logits)[token * experts + e]);
    }
    for (std::int64_t slot = first * p.k; slot < end * p.k; ++slot) count += p.expert_ids[slot] == e;
    sums[e] = prob;
    p.tile_counts[blockIdx.x * experts + e] = count;
  }
  if (threadIdx.x == 0) {
    float plogp = 0.0f, square = 0.0f;
    for (std::int64_t i = 0; i < end - first; ++i) {
      plogp += tokens[i].plogp;
      square += tokens[i].square;
    }
    sums[experts] = plogp;
    sums[experts + 1] = square;
  }
}

__global__ void __launch_bounds__(kThreads) route_topk_sums(const __grid_constant__ Forward p) {
  const std::int64_t experts = p.network.num_experts;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * 32 + lane_id();
  const auto sum = static_cast<float>(sum_tiles(p.tile_sums, p.num_tiles, experts + 2, column));
  const auto count = static_cast<std::int32_t>(sum_tiles(p.tile_counts, p.num_tiles, experts, column));
  if (threadIdx.x >= device::kWarp) return;
  if (column < experts) {
    floats(p.prob_sum)[column] = sum;
    p.counts[column] = count;
  } else if (column == experts) {
    *floats(p.plogp_sum) = sum;
  } else if (column == experts + 1) {
    *floats(p.logsumexp_sq_sum) = sum;
  }
}

MFX_LIST_KERNELS(kListed, "route_topk", 80, "route_topk_forward_bf16", "route_topk_forward_fp16",
                 "route_topk_forward_fp32", "route_topk_sums");

struct Placed {
  Forward forward;
  std::int64_t bytes;  // of the workspace
};

Placed place(const RouteTopKParams& p) {
  const RouterGateParams& n = p.network;
  Forward forward = {p, rows_of(n, n.segments), num_tiles(n)};
  Workspace workspace(p.workspace);
  const bool is_mlp = n.gate == RouterGate::kMlp, is_gmm = n.gate == RouterGate::kGmm;
  forward.activated = workspace.take<float>(is_mlp ? n.num_tokens * n.hidden_dim : 0);
  forward.z = floats(p.hidden);
  if (is_gmm && p.hidden == nullptr) forward.z = workspace.take<float>(n.num_tokens * n.hidden_dim);
  forward.scales = workspace.take<float>(is_gmm ? n.num_tokens : 0);
  forward.scores = workspace.take<float>(p.ranking.by_score() ? n.num_tokens * n.num_experts : 0);
  forward.group_keys =
      workspace.take<std::int64_t>(p.ranking.leaves_groups_out() ? n.num_tokens * p.ranking.num_groups : 0);
  forward.tile_sums = workspace.take<float>(num_tiles(n) * (n.num_experts + 2));
  forward.tile_counts = workspace.take<std::int32_t>(num_tiles(n) * n.num_experts);
  return {forward, workspace.bytes()};
}

}  // namespace mfx::router

namespace mfx {

std::int64_t mfx_route_topk_cuda_workspace(const RouteTopKParams& p) {
  return router::place(p).bytes;
}

Status mfx_route_topk_cuda(const RouteTopKParams& p, Stream stream) {
  if (const Status status = router::check(p.network); !status.ok()) return status;
  const router::Forward forward = router::place(p).forward;
  const auto tiles = static_cast<unsigned>(forward.num_tiles);
  if (tiles > 0) {
    const DType operands = router::operand_type(forward.network);
    const Status status = router::with_tiles(p.network, [&](auto kind) {
      using Tiles = decltype(kind);
      const auto kernel = operands == DType::kBFloat16  ? router::route_topk_forward<BFloat16, Tiles>
                          : operands == DType::kFloat16 ? router::route_topk_forward<Float16, Tiles>
                                                        : router::route_topk_forward<float, Tiles>;
      return launch(kernel, tiles, router::kThreads, 0, stream, forward);
    });
    if (!status.ok()) return status;
  }
  const auto blocks = static_cast<unsigned>(ceil_div(p.network.num_experts + 2, 32));
  return launch(router::route_topk_sums, blocks, router::kThreads, 0, stream, forward);
}

}  // namespace mfx
