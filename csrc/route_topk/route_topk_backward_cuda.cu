// Blocks of 16 or 32 tokens: the gradient of the logits, then of z, then of x. Then blocks of the weight gradients,
// which sum over a piece of the tokens in order (route_topk_weight_grad.cuh); and of the bias, from sums per tile.
// Where there are several pieces a third launch adds them, in order.
//
//   dz = (d logits W) * activation'(z),  dx = dz V,  dV = dz^T x,  dW = d logits^T h;  linear: dx = d logits W
#include <cuda_runtime.h>

#include "route_topk/route_topk_select.cuh"
#include "route_topk/route_topk_weight_grad.cuh"

namespace mfx::router {

// d logits of a token, by one warp.
template <typename Op>
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
    } else if (n.gate == RouterGate::kLinear) {
      static_cast<Op*>(p.inner_grads)[token * p.inner_stride + e] = device::from_float<Op>(value);
    } else {
      p.logit_grads[token * p.logit_stride + e] = value;
    }
  });
}

// grad_z of a token from after the nonlinearity to before it, and the activated z, by one warp.
template <typename Op>
__device__ void activate_backward(const Backward& p, std::int64_t token) {
  const RouterGateParams& n = p.network;
  const float* z = floats(p.hidden) + token * n.hidden_dim;
  float* grad = p.z_grads + token * p.inner_stride;
  float* activated = p.activated + token * p.activated_stride;
  Op* rounded = static_cast<Op*>(p.inner_grads) + token * p.inner_stride;  // float: grad itself
  const bool is_gmm = n.gate == RouterGate::kGmm;
  float scale = 1.0f, along = 0.0f;
  if (is_gmm) {
    scale = inverse_norm(z, n.hidden_dim);
    for (std::int64_t g = lane_id(); g < n.hidden_dim; g += device::kWarp) along += z[g] * grad[g];
    along = device::lanes_sum(along) * scale * scale;
    if (scale >= 1.0f / static_cast<float>(kRouterNormFloor)) along = 0.0f;  // below the floor the norm is a constant
  }
  for (std::int64_t g = lane_id(); g < n.hidden_dim; g += device::kWarp) {
    const Gelu gelu(z[g]);
    const float value = is_gmm ? scale * (grad[g] - z[g] * along) : grad[g] * gelu.slope;
    grad[g] = value;
    activated[g] = is_gmm ? z[g] * scale : gelu.value;
    if constexpr (sizeof(Op) == 2) rounded[g] = device::from_float<Op>(value);
  }
}

template <typename Op, typename Tiles>
__global__ void __launch_bounds__(kThreads, Tiles::Wide::kBlocksPerSm)
    route_topk_backward_tokens(const __grid_constant__ Backward p) {
  using Shape = typename Tiles::Wide;
  constexpr device::Major kMN = device::Major::kMN;
  __shared__ alignas(1024) char memory[Shape::kPipelineBytes];
  const device::SharedAddress tiles = device::shared_address(memory);
  const RouterGateParams& n = p.network;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * Tiles::kTokens;
  const std::int64_t end = min(first + Tiles::kTokens, n.num_tokens);
  for_each_token(first, end, [&](std::int64_t token) { logit_gradient<Op>(p, token); });
  if (n.gate == RouterGate::kLogits) return;
  __syncthreads();
  if (has_hidden_layer(n.gate)) {
    product_rows<float, Shape>(  // d h = d logits W
        tiles, RowMatrix{p.logit_grads, DType::kFloat32, p.logit_stride}, ExpertMatrix<kMN>{p.experts, n.hidden_dim},
        first, end, n.hidden_dim, n.num_experts, [&](std::int64_t token, std::int64_t g, float x, float y, bool both) {
          store_pair(p.z_grads + token * p.inner_stride + g, x, y, both);
        });
    __syncthreads();
    for_each_token(first, end, [&](std::int64_t token) { activate_backward<Op>(p, token); });
    __syncthreads();
    for (std::int64_t g = threadIdx.x; p.grad_hidden_bias != nullptr && g < n.hidden_dim; g += kThreads) {
      float sum = 0.0f;
      for (std::int64_t token = first; token < end; ++token) sum += p.z_grads[token * p.inner_stride + g];
      p.bias_sums[blockIdx.x * n.hidden_dim + g] = sum;
    }
  }
  if (p.grad_x == nullptr) return;
  const RowMatrix grad = {p.inner_grads, kDTypeOf<Op>, p.inner_stride};
  const auto write = [&](std::int64_t token, std::int64_t d, float x, float y, bool both) {
    store_pair(p.grad_x, n.x_dtype, token * n.dim + d, x, y, both);
  };
  if (has_hidden_layer(n.gate)) {  // dx = dz V, or d logits W
    product_rows<Op, Shape>(tiles, grad, ColumnMatrix{n.hidden_weight, n.hidden_weight_dtype, n.dim}, first, end, n.dim,
                            p.inner(), write);
  } else {
    product_rows<Op, Shape>(tiles, grad, ExpertMatrix<kMN>{p.experts, n.dim}, first, end, n.dim, p.inner(), write);
  }
}

MFX_LIST_KERNELS(kListed, "route_topk_backward", 80, "route_topk_backward_tokens_bf16",
                 "route_topk_backward_tokens_fp32", "route_topk_backward_weights_bf16",
                 "route_topk_backward_weights_fp32", "route_topk_backward_pieces");

// float16 has too little range for gradients to be rounded to it before they meet x and V.
DType multiplied_type(const RouterGateParams& n) {
  return operand_type(n) == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

struct Placed {
  Backward backward;
  std::int64_t bytes;  // of the workspace
};

Placed place(const RouteTopKBackwardParams& p) {
  const RouterGateParams& n = p.network;
  Backward backward = {p, rows_of(n, n.segments), rows_of(n, p.grad_segments)};
  const bool wants_experts =
      std::any_of(p.grad_segments, p.grad_segments + n.num_segments, [](void* g) { return g != nullptr; });
  backward.num_tiles = num_tiles(n);
  const auto aligned = [](std::int64_t columns) { return ceil_div(columns, std::int64_t{8}) * 8; };
  const bool has_hidden = has_hidden_layer(n.gate), has_weights = n.gate != RouterGate::kLogits;
  backward.logit_stride = aligned(n.num_experts);
  backward.inner_stride = aligned(has_hidden ? n.hidden_dim : n.num_experts);
  backward.activated_stride = aligned(n.hidden_dim);
  Workspace workspace(p.workspace);
  backward.logit_grads = workspace.take<float>(has_hidden ? n.num_tokens * backward.logit_stride : 0);
  backward.z_grads = workspace.take<float>(has_hidden ? n.num_tokens * backward.inner_stride : 0);
  backward.activated = workspace.take<float>(has_hidden ? n.num_tokens * backward.activated_stride : 0);
  const std::int64_t inner = has_weights ? n.num_tokens * backward.inner_stride : 0;
  backward.inner_grads = multiplied_type(n) == DType::kBFloat16 ? workspace.take<BFloat16>(inner)
                         : has_hidden                           ? static_cast<void*>(backward.z_grads)
                                                                : workspace.take<float>(inner);
  backward.bias_sums = workspace.take<float>(p.grad_hidden_bias != nullptr ? backward.num_tiles * n.hidden_dim : 0);
  if (has_hidden) {
    if (p.grad_hidden_weight != nullptr) backward.input = {n.hidden_dim, n.dim, n.num_tokens};
    if (wants_experts) backward.expert = {n.num_experts, n.hidden_dim, n.num_tokens};
  } else if (has_weights && wants_experts) {
    backward.input = {n.num_experts, n.dim, n.num_tokens};
  }
  for (WeightGradient* gradient : {&backward.input, &backward.expert}) {
    gradient->partial = workspace.take<float>(gradient->partial_size());
  }
  backward.bias_blocks = p.grad_hidden_bias != nullptr ? ceil_div(n.hidden_dim, 32) : 0;
  return {backward, workspace.bytes()};
}

template <typename Op>
Status launch_backward(const Backward& p, Stream stream) {
  if (p.num_tiles > 0) {
    const auto tiles = static_cast<unsigned>(p.num_tiles);
    const Status status = with_tiles(p.network, [&](auto kind) {
      return launch(route_topk_backward_tokens<Op, decltype(kind)>, tiles, kThreads, 0, stream, p);
    });
    if (!status.ok()) return status;
  }
  const std::int64_t blocks = p.input.blocks() + p.expert.blocks() + p.bias_blocks;
  if (blocks == 0) return {};
  const Status status = launch(route_topk_backward_weights<Op>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  const std::int64_t rows = p.input.rows_to_add() + p.expert.rows_to_add();
  if (!status.ok() || rows == 0) return status;
  const std::int64_t columns = std::max(p.input.columns, p.expert.columns);
  const dim3 adding(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(columns, std::int64_t{kColumnsToAdd})));
  return launch(route_topk_backward_pieces, adding, kThreads, 0, stream, p);
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
  return router::multiplied_type(n) == DType::kBFloat16 ? router::launch_backward<BFloat16>(backward, stream)
                                                        : router::launch_backward<float>(backward, stream);
}

}  // namespace mfx
