// Gradients of the experts' matrices: dW_e = sum over the expert's positions p of x_p^T g_p, both operands gathered.
//
// One tile of one matrix per block. Depth is the expert's positions, in their order, so the bits repeat. An expert
// without positions gets zeros; one whose gradient nobody wants gets nothing.
#pragma once

#include <algorithm>

#include "grouped_gemm/epilogue.cuh"

namespace mfx::grouped {

// Both operands' rows of an expert's positions. A position's slot is read one slice ahead of its rows.
template <typename T, typename Shape, bool kAligned>
class RoutedLoader {
  using LeftRows = DepthRows<T, Shape, Shape::kRows, kAligned>;
  using RightRows = DepthRows<T, Shape, Shape::kColumns, kAligned>;
  static constexpr int kPasses = LeftRows::kPasses, kRowsPerPass = LeftRows::kRowsPerPass;
  static_assert(kPasses == RightRows::kPasses, "a thread copies the same positions of both");
  static constexpr int kElement = sizeof(T);

 public:
  __device__ RoutedLoader(const WeightGradParams& p, int row, int column, int first, int depth)
      : p_(p),
        left_([&](int c) { return p.x.data + std::int64_t{row + c} * kElement; },
              [&](int c) { return p.in_features - row - c; }),
        right_([&](int c) { return p.grad.data + std::int64_t{column + c} * kElement; },
               [&](int c) { return p.out_features - column - c; }),
        position_(first + LeftRows::first_row()),
        end_(first + depth) {
    if (depth > 0) fetch_slots();
  }

  __device__ void load(SharedAddress stage, int depth) {
    depth >= LeftRows::kDepth ? copy<true>(stage) : copy<false>(stage);
  }

 private:
  template <bool kWhole>
  __device__ void copy(SharedAddress stage) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool present = kWhole || position(i) < end_;
      left_.copy(stage, i, offset(p_.x, i), present);
      right_.copy(stage + Shape::kABytes, i, offset(p_.grad, i), present);
    }
    position_ += LeftRows::kDepth;
    fetch_slots();
  }
  __device__ int position(int pass) const { return position_ + pass * kRowsPerPass; }
  __device__ std::int64_t offset(const RowMap& map, int pass) const {
    const std::uint32_t units = map.units(map.by_slot ? slot_[pass] : min(position(pass), end_ - 1));
    return std::int64_t{units} * (kAligned ? RowMap::kAlignedUnit : map.unit);
  }
  // Beyond the end the last one's: its rows are not copied, but their addresses are computed.
  __device__ void fetch_slots() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) slot_[i] = p_.slot_order[min(position(i), end_ - 1)];
  }

  const WeightGradParams& p_;
  LeftRows left_;
  RightRows right_;
  std::int32_t slot_[kPasses];
  int position_, end_;
};

template <typename Op, typename Shape_, bool kAligned_>
class WeightGrad {
 public:
  using Params = WeightGradParams;
  using Shape = Shape_;
  static constexpr Product kProduct = Product::kWeightGrad;
  static constexpr bool kTransposed = false, kAligned = kAligned_, kExactArch = false;
  static constexpr int kArch = 80, kBlockThreads = Shape::kThreads, kColumnsPerDot = Shape::kColumnsPerWarp;
  static constexpr int kSharedBytes = std::max(Shape::kPipelineBytes, Epilogue<Shape>::kSharedBytes);

 private:
  using T = typename Storage<Op>::Type;

 public:
  static __device__ void run(const WeightGradParams& p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned row_tiles = (p.in_features + Shape::kRows - 1) / Shape::kRows;
    const unsigned column_tiles = (p.out_features + Shape::kColumns - 1) / Shape::kColumns;
    const unsigned expert = blockIdx.x / (row_tiles * column_tiles), local = blockIdx.x % (row_tiles * column_tiles);
    char* const grad = p.grad_weight[expert];
    if (grad == nullptr) return;
    const int row = local % row_tiles * Shape::kRows, column = local / row_tiles * Shape::kColumns;
    const int first = p.offsets[expert], depth = p.offsets[expert + 1] - first;
    const int rows = Shape::rows_of_warp(p.in_features - row, p.out_features - column);
    AccTile<Shape> acc;  // dW = X^T G
    device::mainloop(acc, WarpGemm<Op, Shape, Major::kMN, Major::kMN>(), device::shared_address(shared),
                     RoutedLoader<T, Shape, kAligned>(p, row, column, first, depth), depth, rows);

    const int first_column = column + Epilogue<Shape>::template column<false>();
    const int columns_left = p.out_features - first_column;
    const int end = columns_left > 0 ? p.in_features - row : 0;
    const std::int64_t row_bytes = p.grad_weight.row_bytes;
    const int lane_row = Epilogue<Shape>::template first_row<false>();
    char* to = grad + (row + lane_row) * row_bytes + first_column * static_cast<std::int64_t>(sizeof(T));
    Epilogue<Shape>::template visit<false>(acc, device::shared_address(shared), rows,
                                           [&](int r, const float4& sum, const float4&) {
                                             if (r < end) store4<T, kAligned>(to, sum, columns_left);
                                             to += Epilogue<Shape>::template kRowsPerPass<false> * row_bytes;
                                           });
  }
};

}  // namespace mfx::grouped
