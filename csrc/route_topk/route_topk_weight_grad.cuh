// Gradients of V and W: sums over tokens of products of two rows, grad^T x. The tokens are cut into pieces, a block for
// each tile of the result and piece, so that there are enough blocks to fill a GPU whatever the size of the matrix; a
// second pass adds the pieces in order. How many there are follows from the shape alone: the same bits on every GPU.
#pragma once

#include "route_topk/route_topk_launch.cuh"

namespace mfx::router {

// All warps have all rows of the tile, so that none is idle where there are few experts.
using WeightShape = device::BlockShape<64, 128, 1, 4, 1, 64, 3, 3>;

inline constexpr int kColumnsToAdd = 2 * kThreads;  // of a block of the second pass

struct WeightGradient {
  std::int64_t rows = 0, columns = 0, tokens = 0;
  std::int64_t pieces = 0, piece_tokens = 0;
  float* partial = nullptr;  // [pieces, rows, stride()], where there are several

  WeightGradient() = default;
  WeightGradient(std::int64_t rows_, std::int64_t columns_, std::int64_t tokens_)
      : rows(rows_), columns(columns_), tokens(tokens_) {
    if (tiles() == 0) return;
    constexpr std::int64_t kBlocks = 512;       // three to four per multiprocessor of a large GPU
    constexpr std::int64_t kLeastTokens = 256;  // of a piece: its sum is written and read again
    const std::int64_t wanted = std::min(kBlocks / tiles(), tokens / kLeastTokens);
    piece_tokens = ceil_div(ceil_div(tokens, std::max(wanted, std::int64_t{1})), kLeastTokens) * kLeastTokens;
    pieces = std::max(ceil_div(tokens, std::max(piece_tokens, std::int64_t{1})), std::int64_t{1});
  }

  __host__ __device__ std::int64_t column_tiles() const {
    return ceil_div(columns, std::int64_t{WeightShape::kColumns});
  }
  __host__ __device__ std::int64_t tiles() const {
    return ceil_div(rows, std::int64_t{WeightShape::kRows}) * column_tiles();
  }
  __host__ __device__ std::int64_t blocks() const { return tiles() * pieces; }
  // Of the result, that the second pass writes.
  __host__ __device__ std::int64_t rows_to_add() const { return pieces > 1 ? rows : 0; }
  std::int64_t partial_size() const { return rows_to_add() * stride() * pieces; }
  // Of partial: pairs are aligned.
  __host__ __device__ std::int64_t stride() const { return columns + columns % 2; }

  // Neighbouring blocks have the same piece, whose rows they share in L2.
  __device__ ProductPart part(int block) const {
    const int across = static_cast<int>(column_tiles()), all = static_cast<int>(tiles()), tile = block % all;
    const std::int64_t first = block / all * piece_tokens;
    return {tile / across * WeightShape::kRows,
            tile % across * WeightShape::kColumns,
            static_cast<int>(rows),
            static_cast<int>(columns),
            static_cast<int>(first),
            static_cast<int>(min(first + piece_tokens, tokens))};
  }
  // The sum over a piece goes to write(row, column, x, y, both) where it is the only one.
  template <typename Op, typename A, typename B, typename Write>
  __device__ void compute(device::SharedAddress memory, int block, const A& grad, const B& x, Write write) const {
    float* const sums = partial + block / static_cast<int>(tiles()) * rows * stride();
    product_tile<Op, WeightShape>(memory, grad, x, part(block),
                                  [&](std::int64_t row, std::int64_t column, float first, float second, bool both) {
                                    if (pieces > 1) {
                                      device::store_global_64(sums + row * stride() + column, first, second);
                                    } else {
                                      write(row, column, first, second, both);
                                    }
                                  });
  }
  // Of a column, an even one, and the next.
  __device__ float2 sum_of_pieces(int row, int column) const {
    float2 sum = {0.0f, 0.0f};
    const std::int64_t size = rows * stride();
    const float* sums = partial + row * stride() + column;
    for (int piece = 0; piece < static_cast<int>(pieces); ++piece, sums += size) {
      const float2 pair = *reinterpret_cast<const float2*>(sums);
      sum.x += pair.x;
      sum.y += pair.y;
    }
    return sum;
  }
};

struct Backward : RouteTopKBackwardParams {
  ExpertRows experts, grad_experts;  // of the gradients, null where not wanted
  std::int64_t num_tiles;
  // Between the launches. Rows that products read are a multiple of 16 bytes apart.
  float* logit_grads;  // [T, E], with a hidden layer alone
  float* z_grads;      // [T, G], before the nonlinearity
  float* activated;    // [T, G]
  void* inner_grads;   // the gradient that meets x, and V or W, of the type that it is multiplied as
  std::int64_t logit_stride, inner_stride, activated_stride;
  float* bias_sums;              // [tiles, G]
  WeightGradient input, expert;  // of the matrix that x meets; of W after a hidden layer
  std::int64_t bias_blocks;      // of 32 columns each

  // Rows of the matrix that x meets: V's, or W's where there is no V.
  __device__ std::int64_t inner() const {
    return has_hidden_layer(network.gate) ? network.hidden_dim : network.num_experts;
  }
  __device__ void write_expert(std::int64_t columns, std::int64_t expert_row, std::int64_t column, float x, float y,
                               bool both) const {
    if (void* grad = grad_experts.segment_of(expert_row)) {
      store_pair(grad, grad_experts.dtype, expert_row * columns + column, x, y, both);
    }
  }
  __device__ void write_input(std::int64_t row, std::int64_t column, float x, float y, bool both) const {
    if (has_hidden_layer(network.gate)) {
      store_pair(grad_hidden_weight, network.hidden_weight_dtype, row * network.dim + column, x, y, both);
    } else {
      write_expert(network.dim, row, column, x, y, both);
    }
  }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads, WeightShape::kBlocksPerSm)
    route_topk_backward_weights(const __grid_constant__ Backward p) {
  __shared__ alignas(1024) char memory[WeightShape::kPipelineBytes];
  const device::SharedAddress tiles = device::shared_address(memory);
  const RouterGateParams& n = p.network;
  int block = static_cast<int>(blockIdx.x);
  if (block < p.input.blocks()) {  // dV = dz^T x, or dW = d logits^T x
    p.input.compute<Op>(tiles, block, ColumnMatrix{p.inner_grads, kDTypeOf<Op>, p.inner_stride},
                        ColumnMatrix{n.x, n.x_dtype, n.dim},
                        [&](std::int64_t row, std::int64_t column, float x, float y, bool both) {
                          p.write_input(row, column, x, y, both);
                        });
    return;
  }
  block -= static_cast<int>(p.input.blocks());
  if (block < p.expert.blocks()) {  // dW = d logits^T h
    p.expert.compute<float>(tiles, block, ColumnMatrix{p.logit_grads, DType::kFloat32, p.logit_stride},
                            ColumnMatrix{p.activated, DType::kFloat32, p.activated_stride},
                            [&](std::int64_t expert, std::int64_t column, float x, float y, bool both) {
                              p.write_expert(n.hidden_dim, expert, column, x, y, both);
                            });
    return;
  }
  block -= static_cast<int>(p.expert.blocks());
  const std::int64_t column = std::int64_t{block} * 32 + lane_id();
  const double sum = sum_tiles(p.bias_sums, p.num_tiles, n.hidden_dim, column);
  if (threadIdx.x < device::kWarp && column < n.hidden_dim)
    floats(p.grad_hidden_bias)[column] = static_cast<float>(sum);
}

// A row of results by blockIdx.x, 256 of its columns by blockIdx.y.
__global__ void __launch_bounds__(kThreads) route_topk_backward_pieces(const __grid_constant__ Backward p) {
  const int row = static_cast<int>(blockIdx.x), of_input = static_cast<int>(p.input.rows_to_add());
  const int column = static_cast<int>(blockIdx.y * kColumnsToAdd + 2 * threadIdx.x);
  const auto add = [&](const WeightGradient& gradient, int row_there, auto write) {
    if (column >= gradient.columns) return;
    const float2 sum = gradient.sum_of_pieces(row_there, column);
    write(row_there, column, sum.x, sum.y, column + 1 < gradient.columns);
  };
  if (row < of_input) {
    add(p.input, row, [&](int at, int first, float x, float y, bool both) { p.write_input(at, first, x, y, both); });
  } else {
    add(p.expert, row - of_input, [&](int at, int first, float x, float y, bool both) {
      p.write_expert(p.network.hidden_dim, at, first, x, y, both);
    });
  }
}

}  // namespace mfx::router
