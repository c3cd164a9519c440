// What the launchers of forward and backward share.
#pragma once

#include <algorithm>
#include <limits>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "core/workspace.hpp"
#include "route_topk/block_product.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::router {

// Tiles of the products that have a row per token: the more rows, the less often the weights are read, and the fewer
// blocks there are. Wide: as many columns as V has rows or x has columns; narrow: one per expert.
template <int kTokens_>
struct TokenTiles {
  static constexpr int kTokens = kTokens_;
  using Wide = device::BlockShape<kTokens, 128, 1, 4, 1, 64, 3, 4>;
  using Narrow = device::BlockShape<kTokens, 64, kTokens / 16, 64 / kTokens, 1, 64, 3, 4>;
  static constexpr int kBytes = std::max(Wide::kPipelineBytes, Narrow::kPipelineBytes);
};
using SmallTiles = TokenTiles<16>;
using LargeTiles = TokenTiles<32>;
inline constexpr std::int64_t kMostTokensInSmallTiles = 8192;  // 512 blocks: few per multiprocessor of a large GPU

// f(tiles) with the kind of tiles that a call has.
template <typename F>
auto with_tiles(const RouterGateParams& n, F f) {
  return n.num_tokens <= kMostTokensInSmallTiles ? f(SmallTiles()) : f(LargeTiles());
}

inline std::int64_t num_tiles(const RouterGateParams& n) {
  return with_tiles(n, [&](auto tiles) { return ceil_div(n.num_tokens, std::int64_t{decltype(tiles)::kTokens}); });
}

inline ExpertRows rows_of(const RouterGateParams& n, const void* const* data) {
  ExpertRows rows = {};
  rows.dtype = n.weight_dtype;
  rows.aligned = std::all_of(data, data + std::min<std::int64_t>(n.num_segments, ExpertRows::kMost),
                             [](const void* d) { return reinterpret_cast<std::uintptr_t>(d) % 16 == 0; });
  std::int64_t first = 0;
  const std::int64_t segments = std::min<std::int64_t>(n.num_segments, ExpertRows::kMost);  // check() refuses more
  for (std::int64_t s = 0; s < segments; first += n.num_rows[s++]) rows.append(data[s], first);
  return rows;
}

inline Status check(const RouterGateParams& n) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / static_cast<std::int64_t>(sizeof(float));
  const std::int64_t largest = std::max({n.num_tokens, n.dim, n.hidden_dim, n.num_experts});
  if (largest > kMost) {
    return refusal("x and weight must have rows and columns of at most " + std::to_string(kMost) +
                   " for the CUDA kernels, got " + std::to_string(largest));
  }
  if (n.num_segments <= ExpertRows::kMost) return {};
  return refusal("weight must have at most " + std::to_string(ExpertRows::kMost) +
                 " segments for the CUDA kernels, got " + std::to_string(n.num_segments));
}

// The type of x and of the matrix that it meets where they agree, else float32.
inline DType operand_type(const RouterGateParams& n) {
  const DType weight = has_hidden_layer(n.gate) ? n.hidden_weight_dtype : n.weight_dtype;
  return n.gate != RouterGate::kLogits && n.x_dtype == weight ? n.x_dtype : DType::kFloat32;
}

// Sums over the tiles, in order and in double, of 32 columns of partials [tiles][stride] by one block; valid in the
// first warp, whose lane l has column column0 + l.
template <typename T>
__device__ double sum_tiles(const T* partials, std::int64_t tiles, std::int64_t stride, std::int64_t column) {
  __shared__ double sums[kThreads];
  double sum = 0;
  if (column < stride) {
    for (std::int64_t tile = threadIdx.x / 32; tile < tiles; tile += kThreads / 32) {
      sum += static_cast<double>(partials[tile * stride + column]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  sum = (sums[lane] + sums[lane + 32]) + (sums[lane + 64] + sums[lane + 96]);
  __syncthreads();
  return sum;
}

// f(token) for the tokens of a tile, one warp each.
template <typename F>
__device__ void for_each_token(std::int64_t first, std::int64_t end, F f) {
  for (std::int64_t token = first + threadIdx.x / 32; token < end; token += kThreads / 32) f(token);
}

// z -> 1 / max(|z|, floor), by one warp.
__device__ inline float inverse_norm(const float* z, std::int64_t n) {
  float square = 0.0f;
  for (std::int64_t i = threadIdx.x % 32; i < n; i += 32) square += z[i] * z[i];
  return 1.0f / fmaxf(sqrtf(device::lanes_sum(square)), static_cast<float>(kRouterNormFloor));
}

}  // namespace mfx::router
