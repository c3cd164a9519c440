// Two launches. Blocks of 32 tokens: the gradient of the logits, then of z, then of x. Then blocks of the weight
// gradients, 32 x 64 each, which sum over all tokens in order; and of the bias, from sums per tile.
//
//   dz = (d logits W) * activation'(z),  dx = dz V,  dV = dz^T x,  dW = d logits^T h;  linear: dx = d logits W
#include <cuda_runtime.h>

#include "route_topk/route_topk_launch.cuh"
#include "route_topk/route_topk_select.cuh"

namespace mfx::router {

struct Backward : RouteTopKBackwardParams {
  ExpertRows experts, grad_experts;  // of the gradients, null where not wanted
  bool wants_experts;
  std::int64_t num_tiles;
  // Between the launches.
  float* logit_grads;  // [T, E]
  float* z_grads;      // [T, G], before the nonlinearity
  float* scales;       // [T], kGmm alone
  float* bias_sums;    // [tiles, G]

  // Rows of the product that meets x: V's, or W's where there is no V; and their gradient.
  __device__ std::int64_t inner() const {
    return has_hidden_layer(network.gate) ? network.hidden_dim : network.num_experts;
  }
  __device__ const float* grad_inner() const { return has_hidden_layer(network.gate) ? z_grads : logit_grads; }
};

// d logits of a token, by one warp.
__device__ void logit_gradient(const Backward& p, std::int64_t token) {
  const RouterGateParams& n = p.network;
  const auto at = [](const void* rows, std::int64_t offset) {
    return rows == nullptr ? nullptr : floats(rows) + offset;
  };
  const auto value = [](const void* scalar) { return scalar == nullptr ? 0.0f : *floats(scalar); };
  const std::int64_t row = token * n.num_experts;
  const LogitGradient gradient = {
      floats(p.logits) + row,
      p.expert_ids + token * p.k,
      at(p.grad_gates, token * p.k),
      at(p.grad_logits, row),
      floats(p.grad_prob_sum),
      value(p.grad_plogp_sum),
      value(p.grad_logsumexp_sq_sum),
      n.num_experts,
      p.k,
      p.order,
      static_cast<float>(p.scale),
  };
  gradient.compute([&](std::int64_t e, float value) {
    if (n.gate == RouterGate::kLogits) {
      store(p.grad_x, n.x_dtype, row + e, value);
    } else {
      p.logit_grads[row + e] = value;
    }
  });
}

// grad_z of a token from after the nonlinearity to before it, by one warp.
__device__ void activate_backward(const Backward& p, std::int64_t token) {
  const RouterGateParams& n = p.network;
  const float* z = floats(p.hidden) + token * n.hidden_dim;
  float* grad = p.z_grads + token * n.hidden_dim;
  if (n.gate == RouterGate::kMlp) {
    for (std::int64_t g = lane_id(); g < n.hidden_dim; g += device::kWarp) grad[g] *= gelu_slope(z[g]);
    return;
  }
  const float scale = inverse_norm(z, n.hidden_dim);
  float along = 0.0f;
  for (std::int64_t g = lane_id(); g < n.hidden_dim; g += device::kWarp) along += z[g] * grad[g];
  along = device::lanes_sum(along) * scale * scale;
  if (scale >= 1.0f / static_cast<float>(kRouterNormFloor)) along = 0.0f;  // below the floor the norm is a constant
  for (std::int64_t g = lane_id(); g < n.hidden_dim; g += device::kWarp) grad[g] = scale * (grad[g] - z[g] * along);
  if (lane_id() == 0) p.scales[token] = scale;
}

template <typename Op>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSm)
    route_topk_backward_tokens(const __grid_constant__ Backward p) {
  __shared__ ProductTiles tiles;
  const RouterGateParams& n = p.network;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileRows;
  const std::int64_t end = min(first + kTileRows, n.num_tokens);
  for_each_token(first, end, [&](std::int64_t token) { logit_gradient(p, token); });
  if (n.gate == RouterGate::kLogits) return;
  __syncthreads();
  if (has_hidden_layer(n.gate)) {
    product_rows<float>(  // d h = d logits W
        tiles, Matrix{p.logit_grads, DType::kFloat32, n.num_experts, true},
        ExpertMatrix{p.experts, n.hidden_dim, false}, first, end, n.hidden_dim, n.num_experts,
        [&](std::int64_t token, std::int64_t g, float value) { p.z_grads[token * n.hidden_dim + g] = value; });
    __syncthreads();
    for_each_token(first, end, [&](std::int64_t token) { activate_backward(p, token); });
    __syncthreads();
    for (std::int64_t g = threadIdx.x; p.grad_hidden_bias != nullptr && g < n.hidden_dim; g += kThreads) {
      float sum = 0.0f;
      for (std::int64_t token = first; token < end; ++token) sum += p.z_grads[token * n.hidden_dim + g];
      p.bias_sums[blockIdx.x * n.hidden_dim + g] = sum;
    }
  }
  if (p.grad_x == nullptr) return;
  const Matrix grad = {p.grad_inner(), DType::kFloat32, p.inner(), true};
  const auto write = [&](std::int64_t token, std::int64_t d, float value) {
    store(p.grad_x, n.x_dtype, token * n.dim + d, value);
  };
  if (has_hidden_layer(n.gate)) {  // dx = dz V, or d logits W
    product_rows<Op>(tiles, grad, Matrix{n.hidden_weight, n.hidden_weight_dtype, n.dim, false}, first, end, n.dim,
                     p.inner(), write);
  } else {
    product_rows<Op>(tiles, grad, ExpertMatrix{p.experts, n.dim, false}, first, end, n.dim, p.inner(), write);
  }
}

// How the second launch's blocks are shared out: first tiles of the gradient that meets x, then tiles of dW after a
// hidden layer, then 32 columns of the bias each.
struct WeightBlocks {
  std::int64_t input_columns, input;
  std::int64_t expert_columns, experts;
  std::int64_t bias;

  std::int64_t total() const { return input + experts + bias; }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSm)
    route_topk_backward_weights(const __grid_constant__ Backward p, WeightBlocks blocks) {
  __shared__ ProductTiles tiles;
  const RouterGateParams& n = p.network;
  std::int64_t block = blockIdx.x;
  const auto write_expert = [&](std::int64_t columns) {
    return [&p, columns](std::int64_t expert, std::int64_t column, float value) {
      if (void* grad = p.grad_experts.segment_of(expert))
        store(grad, p.grad_experts.dtype, expert * columns + column, value);
    };
  };
  if (block < blocks.input) {  // dV = dz^T x, or dW = d logits^T x
    const std::int64_t row = block / blocks.input_columns * kTileRows;
    const std::int64_t column = block % blocks.input_columns * kTileColumns;
    const Matrix grad = {p.grad_inner(), DType::kFloat32, p.inner(), false}, x = {n.x, n.x_dtype, n.dim, false};
    if (has_hidden_layer(n.gate)) {
      product_tile<Op>(tiles, grad, x, row, column, p.inner(), n.dim, n.num_tokens,
                       [&](std::int64_t g, std::int64_t d, float value) {
                         store(p.grad_hidden_weight, n.hidden_weight_dtype, g * n.dim + d, value);
                       });
    } else {
      product_tile<Op>(tiles, grad, x, row, column, p.inner(), n.dim, n.num_tokens, write_expert(n.dim));
    }
    return;
  }
  block -= blocks.input;
  if (block < blocks.experts) {  // dW = d logits^T h
    product_tile<float>(tiles, Matrix{p.logit_grads, DType::kFloat32, n.num_experts, false},
                        Activated{n.gate, floats(p.hidden), p.scales, n.hidden_dim, false},
                        block / blocks.expert_columns * kTileRows, block % blocks.expert_columns * kTileColumns,
                        n.num_experts, n.hidden_dim, n.num_tokens, write_expert(n.hidden_dim));
    return;
  }
  block -= blocks.experts;
  const std::int64_t column = block * 32 + lane_id();
  const double sum = sum_tiles(p.bias_sums, p.num_tiles, n.hidden_dim, column);
  if (threadIdx.x < device::kWarp && column < n.hidden_dim)
    floats(p.grad_hidden_bias)[column] = static_cast<float>(sum);
}

MFX_LIST_KERNELS(kListed, "route_topk_backward", 80, "route_topk_backward_tokens_bf16",
                 "route_topk_backward_tokens_fp32", "route_topk_backward_weights_bf16",
                 "route_topk_backward_weights_fp32");

struct Placed {
  Backward backward;
  std::int64_t bytes;  // of the workspace
};

Placed place(const RouteTopKBackwardParams& p) {
  const RouterGateParams& n = p.network;
  Backward backward = {p, rows_of(n, n.segments), rows_of(n, p.grad_segments)};
  backward.wants_experts = std::any_of(p.grad_segments, p.grad_segments + n.num_segments, [](void* g) { return g; });
  backward.num_tiles = num_tiles(n);
  Workspace workspace(p.workspace);
  backward.logit_grads = workspace.take<float>(n.gate == RouterGate::kLogits ? 0 : n.num_tokens * n.num_experts);
  backward.z_grads = workspace.take<float>(n.num_tokens * n.hidden_dim);
  backward.scales = workspace.take<float>(n.gate == RouterGate::kGmm ? n.num_tokens : 0);
  backward.bias_sums = workspace.take<float>(p.grad_hidden_bias != nullptr ? num_tiles(n) * n.hidden_dim : 0);
  return {backward, workspace.bytes()};
}

WeightBlocks weight_blocks(const Backward& p) {
  const RouterGateParams& n = p.network;
  WeightBlocks blocks = {};
  const auto row_tiles = [](std::int64_t rows) { return ceil_div(rows, kTileRows); };
  blocks.input_columns = ceil_div(n.dim, kTileColumns);
  blocks.expert_columns = ceil_div(n.hidden_dim, kTileColumns);
  if (has_hidden_layer(n.gate)) {
    if (p.grad_hidden_weight != nullptr) blocks.input = row_tiles(n.hidden_dim) * blocks.input_columns;
    if (p.wants_experts) blocks.experts = row_tiles(n.num_experts) * blocks.expert_columns;
    if (p.grad_hidden_bias != nullptr) blocks.bias = ceil_div(n.hidden_dim, 32);
  } else if (p.wants_experts) {
    blocks.input = row_tiles(n.num_experts) * blocks.input_columns;
  }
  return blocks;
}

template <typename Op>
Status launch_backward(const Backward& p, Stream stream) {
  if (p.num_tiles > 0) {
    const auto tiles = static_cast<unsigned>(p.num_tiles);
    const Status status = launch(route_topk_backward_tokens<Op>, tiles, kThreads, 0, stream, p);
    if (!status.ok()) return status;
  }
  const WeightBlocks blocks = weight_blocks(p);
  if (blocks.total() == 0) return {};
  return launch(route_topk_backward_weights<Op>, static_cast<unsigned>(blocks.total()), kThreads, 0, stream, p, blocks);
}

}  // namespace mfx::router

namespace mfx {

std::int64_t mfx_route_topk_backward_cuda_workspace(const RouteTopKBackwardParams& p) {
  return router::place(p).bytes;
}

Status mfx_route_topk_backward_cuda(const RouteTopKBackwardParams& p, Stream stream) {
  const RouterGateParams& n = p.network;
  if (const Status status = router::check(n); !status.ok()) return status;
  if (n.gate == RouterGate::kLogits && p.grad_x == nullptr) return {};
  const router::Backward backward = router::place(p).backward;
  // float16 has too little range for gradients to be rounded to it before they meet x and V.
  return router::operand_type(backward.network) == DType::kBFloat16
             ? router::launch_backward<BFloat16>(backward, stream)
             : router::launch_backward<float>(backward, stream);
}

}  // namespace mfx
