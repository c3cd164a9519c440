// Gradients of the experts' matrices: dW_e = sum over the expert's positions p of x_p^T g_p, both operands gathered.
//
// One tile of one matrix per block. Depth is the expert's positions, in their order, so the bits repeat. An expert
// without positions gets zeros; one whose gradient nobody wants gets nothing.
#pragma once

#include <algorithm>

#include "grouped_gemm/way_out.cuh"

namespace mfx::grouped {

template <typename Math, typename Shape_, bool kAligned_>
class WeightGrad {
 public:
  using Params = WeightGradParams;
  using Shape = Shape_;
  static constexpr Product kProduct = Product::kWeightGrad;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kSharedBytes = std::max(Shape::kPipelineBytes, WayOut<Shape>::kSharedBytes);

 private:
  using T = typename Math::T;
  static constexpr int kElement = sizeof(T);
  using LeftLoader = ResultMajorLoader<Math, Shape, Shape::kRows, kAligned, RoutedDepth>;
  using RightLoader = ResultMajorLoader<Math, Shape, Shape::kColumns, kAligned, RoutedDepth>;

 public:
  static __device__ void run(const WeightGradParams& p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Multistage<Math, Shape, Major::kResult, Major::kResult> product(device::shared_address(shared));
    const int row_tiles = (p.in_features + Shape::kRows - 1) / Shape::kRows;
    const int column_tiles = (p.out_features + Shape::kColumns - 1) / Shape::kColumns;
    const std::int64_t per_expert = std::int64_t{row_tiles} * column_tiles;
    for (std::int64_t i = blockIdx.x; i < per_expert * p.num_experts; i += gridDim.x) {
      const int expert = static_cast<int>(i / per_expert), local = static_cast<int>(i % per_expert);
      char* const grad = p.grad_weight[expert];
      if (grad == nullptr) continue;
      const int row = local % row_tiles * Shape::kRows, column = local / row_tiles * Shape::kColumns;
      const int first = p.offsets[expert], depth = p.offsets[expert + 1] - first;
      LeftLoader left(
          RoutedDepth{p.x, first}, depth, [&](int c) { return p.x.data + std::int64_t{row + c} * kElement; },
          [&](int c) { return p.in_features - row - c; });
      RightLoader right(
          RoutedDepth{p.grad, first}, depth, [&](int c) { return p.grad.data + std::int64_t{column + c} * kElement; },
          [&](int c) { return p.out_features - column - c; });
      const int rows = column + Shape::warp_column() < p.out_features
                           ? min(p.in_features - row - Shape::warp_row(), Shape::kRowsPerWarp)
                           : 0;
      Accumulators<Shape> sums;
      product.run(sums, left, right, depth, rows);
      const int first_column = column + WayOut<Shape>::template column<false>();
      const int columns_left = p.out_features - first_column;
      char* const to = grad + row * p.grad_weight.row_bytes + std::int64_t{first_column} * kElement;
      WayOut<Shape>::template visit<false>(sums, device::shared_address(shared), rows,
                                           [&](int r, const float4& sum, const float4&) {
                                             if (row + r >= p.in_features || columns_left <= 0) return;
                                             store4<T, kAligned>(to + r * p.grad_weight.row_bytes, sum, columns_left);
                                           });
      __syncthreads();
    }
  }
};

}  // namespace mfx::grouped
