// grouped_gemm's forward product (grouped_gemm/row_product_kernel.cuh) with quantised matrices: the same tiles, rows of
// x and way out.
#pragma once

#include <algorithm>

#include "grouped_gemm/row_product_kernel.cuh"
#include "quantised_gemm/operand.cuh"

namespace mfx::quantised {

struct ProductParams {
  grouped::RowProductParams product;  // without `matrices`
  Matrices matrices;
};

template <typename Op, typename Base, int kBits, bool kAligned_>
class Product {
 public:
  using Params = ProductParams;
  using Shape = quantised::Shape<Base, kBits>;
  static constexpr grouped::Product kProduct = grouped::Product::kForward;
  static constexpr bool kTransposed = false, kAligned = kAligned_, kExactArch = false;
  static constexpr int kArch = 80, kBlockThreads = Shape::kThreads, kColumnsPerDot = Shape::kColumnsPerWarp;

 private:
  using Gemm = WarpGemm<Op, Shape>;
  using Table = grouped::RowTable<Shape::kRows>;
  using Gated = grouped::GatedColumns<Shape>;
  using Out = grouped::Epilogue<Shape, LaneOfSixteen>;
  static_assert(Gated::kHalf % 16 == 0, "sixteen columns of a lane lie in one half");

 public:
  static constexpr int kTableOffset = std::max(Shape::kPipelineBytes, Out::kSharedBytes);
  static constexpr int kSharedBytes = kTableOffset + sizeof(Table);

  static __device__ void run(const ProductParams& params) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const grouped::RowProductParams& p = params.product;
    Table& table = *reinterpret_cast<Table*>(shared + kTableOffset);
    const Gemm gemm;
    const bool gated = p.activation.gated;
    const int tile_columns = gated ? Shape::kColumns / 2 : Shape::kColumns;
    const int column_tiles = (p.columns + tile_columns - 1) / tile_columns;
    grouped::RowTile tile;
    for (unsigned i = blockIdx.x;
         grouped::find_row_tile(p.offsets, p.num_experts, Shape::kRows, column_tiles, i, &tile); i += gridDim.x) {
      const int column = tile.column_tile * tile_columns;
      const auto column_of = [&](int c) {
        return gated ? column + Gated::within_half(c) + (Gated::second_half(c) ? p.columns : 0) : column + c;
      };
      for (int row = threadIdx.x; row < tile.rows; row += Shape::kThreads) {
        grouped::describe_row<kProduct>(table, p, tile.first, row);
      }
      grouped::RowLoader<Op, Shape, Shape::kRows, kAligned> a(
          p.depth, [&](int row) { return p.rows.data + p.rows.offset(tile.first + row, p.slot_order); },
          [&](int row) { return row < tile.rows; });
      Loader<Shape> b(params.matrices, tile.expert, column_of);
      const int rows = Shape::rows_of_warp(tile.rows, (gated ? 2 : 1) * (p.columns - column));
      AccTile<Shape> acc;
      device::mainloop(acc, gemm, device::shared_address(shared),
                       grouped::BothOperands<Shape, decltype(a), decltype(b)>{a, b}, p.depth, rows);
      Gemm::finish(acc, params.matrices, tile.expert, column_of);
      if (gated) {
        visit<true, grouped::ForwardOp<Op, true, kAligned>>(p, table, tile, column, acc, rows);
      } else if (p.activation.function != Activation::kNone) {
        visit<false, grouped::ForwardOp<Op, false, kAligned>>(p, table, tile, column, acc, rows);
      } else {
        visit<false, grouped::PlainOp<Op, kAligned>>(p, table, tile, column, acc, rows);
      }
      __syncthreads();
    }
  }

 private:
  template <bool kFolded, typename OutputOp>
  static __device__ void visit(const grouped::RowProductParams& p, const Table& table, const grouped::RowTile& tile,
                               int tile_column, const AccTile<Shape>& acc, int rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const OutputOp output_op(p, tile, tile_column + Out::template column<kFolded>());
    Out::template visit<kFolded>(acc, device::shared_address(shared), rows,
                                 [&](int row, const float4& y, const float4& partner) {
                                   if (output_op.left > 0 && row < tile.rows) output_op(row, y, partner, table);
                                 });
  }
};

}  // namespace mfx::quantised
