// Products with the matrix of each position's expert; see RowProductParams for the three forms.
//
// A persistent grid walks the tiles (kRows positions of one expert) x (kColumns columns), expert by expert and, within
// one, rows fastest, so that neighbouring blocks share a panel of the matrix. Where an expert's positions begin is read
// from the layout on the device: nobody waits for the host, experts without positions have no tiles, nothing is padded.
#pragma once

#include <algorithm>

#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/output_op.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::grouped {

// False beyond the last tile. Whole warps call this; every lane looks at one of 32 experts.
__device__ inline bool find_row_tile(const std::int32_t* offsets, int num_experts, int rows_per_tile, int column_tiles,
                                     unsigned tile, RowTile* found) {
  const int lane = device::lane_id();
  for (int base = 0; base < num_experts; base += 32) {
    const int expert = min(base + lane, num_experts);
    const int begin = offsets[expert], end = offsets[min(expert + 1, num_experts)];
    const int row_tiles = (end - begin + rows_per_tile - 1) / rows_per_tile;
    const unsigned tiles = row_tiles * column_tiles, up_to = device::lanes_prefix_sum(tiles);
    const unsigned later = __ballot_sync(device::kAllLanes, tile < up_to);
    if (later == 0) {
      tile -= __shfl_sync(device::kAllLanes, up_to, 31);
      continue;
    }
    const int owner = __ffs(later) - 1;
    const auto of_owner = [&](int x) { return __shfl_sync(device::kAllLanes, x, owner); };
    const int local = static_cast<int>(tile) - of_owner(up_to - tiles), high = of_owner(row_tiles);
    found->expert = base + owner;
    found->first = of_owner(begin) + local % high * rows_per_tile;
    found->rows = min(rows_per_tile, of_owner(end) - found->first);
    found->column_tile = local / high;
    return true;
  }
  return false;
}

// Fills in what the table has of row `row` of a tile that begins at position `first`.
template <Product kProduct, int kRows>
__device__ void describe_row(RowTable<kRows>& table, const RowProductParams& p, int first, int row) {
  const int position = first + row;
  const std::int64_t offset = p.out.data != nullptr ? p.out.offset(position, p.slot_order) : 0;
  const float gate = p.gates != nullptr ? p.gates[p.slot_order[position]] : 1.0f;
  // In one piece: two would meet in the same banks.
  device::store_shared_128(
      device::shared_address(&table.out[row]),
      {static_cast<unsigned>(offset), static_cast<unsigned>(offset >> 32), __float_as_uint(gate), 0});
  if (kProduct == Product::kInputGrad && p.dots != nullptr) table.x[row] = p.x.offset(position, p.slot_order);
}

// kTransposed: memory holds the rows of W^T.
template <typename Op, typename Shape_, Product kProduct_, bool kTransposed_, bool kAligned_>
class RowProduct {
 public:
  using Params = RowProductParams;
  using Shape = Shape_;
  static constexpr Product kProduct = kProduct_;
  static constexpr bool kTransposed = kTransposed_, kAligned = kAligned_, kExactArch = false;
  static constexpr int kArch = 80, kBlockThreads = Shape::kThreads, kColumnsPerDot = Shape::kColumnsPerWarp;

 private:
  using T = typename Storage<Op>::Type;
  static constexpr bool kForward = kProduct == Product::kForward;
  static constexpr int kElement = sizeof(T);
  static constexpr Major kMajor = kForward != kTransposed ? Major::kMN : Major::kK;  // how B lies
  using Gemm = WarpGemm<Op, Shape, Major::kK, kMajor>;
  using Table = RowTable<Shape::kRows>;
  using Gated = GatedColumns<Shape>;
  using Out = Epilogue<Shape>;

 public:
  static constexpr int kTableOffset = std::max(Shape::kPipelineBytes, Out::kSharedBytes);
  static constexpr int kSharedBytes = kTableOffset + sizeof(Table);

  static __device__ void run(const RowProductParams& p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Table& table = *reinterpret_cast<Table*>(shared + kTableOffset);
    const Gemm gemm;
    const bool gated = kForward && p.activation.gated;  // a tile's columns are half of one half, half of the other
    const int tile_columns = gated ? Shape::kColumns / 2 : Shape::kColumns;
    const int column_tiles = (p.columns + tile_columns - 1) / tile_columns;
    RowTile tile;
    for (unsigned i = blockIdx.x; find_row_tile(p.offsets, p.num_experts, Shape::kRows, column_tiles, i, &tile);
         i += gridDim.x) {
      const int column = tile.column_tile * tile_columns;
      fill(table, p, tile);
      auto a = rows_of(p, tile);
      auto b = matrix_of(p, tile, column, gated);
      const int rows = Shape::rows_of_warp(tile.rows, (gated ? 2 : 1) * (p.columns - column));
      AccTile<Shape> acc;  // Y = X B
      device::mainloop(acc, gemm, device::shared_address(shared), BothOperands<Shape, decltype(a), decltype(b)>{a, b},
                       p.depth, rows);
      finish(p, table, tile, column, gated, acc, rows);
      __syncthreads();
    }
  }

 private:
  static __device__ auto rows_of(const RowProductParams& p, const RowTile& tile) {
    return RowLoader<T, Shape, Shape::kRows, kAligned>(
        p.depth, [&](int row) { return p.rows.data + p.rows.offset(tile.first + row, p.slot_order); },
        [&](int row) { return row < tile.rows; });
  }

  static __device__ auto matrix_of(const RowProductParams& p, const RowTile& tile, int column, bool gated) {
    const char* matrix = p.matrices[tile.expert];
    const auto column_of = [&](int c) -> std::int64_t {
      return gated ? column + Gated::within_half(c) + (Gated::second_half(c) ? p.columns : 0) : column + c;
    };
    const auto columns_left = [&](int c) { return p.columns - column - (gated ? Gated::within_half(c) : c); };
    if constexpr (kMajor == Major::kMN) {
      return MatrixLoader<T, Shape, Shape::kColumns, kAligned>(
          p.matrices.row_bytes, p.depth, [&](int c) { return matrix + column_of(c) * kElement; }, columns_left);
    } else {
      return RowLoader<T, Shape, Shape::kColumns, kAligned>(
          p.depth, [&](int c) { return matrix + column_of(c) * p.matrices.row_bytes; },
          [&](int c) { return columns_left(c) > 0; });
    }
  }

  static __device__ void finish(const RowProductParams& p, const Table& table, const RowTile& tile, int column,
                                bool gated, const AccTile<Shape>& acc, int rows) {
    if constexpr (kProduct == Product::kInputGrad) {
      visit_with_dots<InputGradOp<T, kAligned>>(p, table, tile, column, acc, rows);
    } else if constexpr (kProduct == Product::kHiddenGrad) {
      visit_with_dots<HiddenGradOp<T, kAligned>>(p, table, tile, column, acc, rows);
    } else if (gated) {
      visit<true, ForwardOp<T, true, kAligned>>(p, table, tile, column, acc, rows);
    } else if (p.activation.function != Activation::kNone || p.bias != nullptr) {
      visit<false, ForwardOp<T, false, kAligned>>(p, table, tile, column, acc, rows);
    } else {
      visit<false, PlainOp<T, kAligned>>(p, table, tile, column, acc, rows);
    }
  }

  static __device__ void fill(Table& table, const RowProductParams& p, const RowTile& tile) {
    for (int row = threadIdx.x; row < tile.rows; row += Shape::kThreads) {
      describe_row<kProduct>(table, p, tile.first, row);
    }
  }

  template <bool kFolded, typename OutputOp>
  static __device__ void visit(const RowProductParams& p, const Table& table, const RowTile& tile, int tile_column,
                               const AccTile<Shape>& acc, int rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const OutputOp output_op(p, tile, tile_column + Out::template column<kFolded>());
    Out::template visit<kFolded>(acc, device::shared_address(shared), rows,
                                 [&](int row, const float4& y, const float4& partner) {
                                   if (output_op.left > 0 && row < tile.rows) output_op(row, y, partner, table);
                                 });
  }

  // Sums what each row's lanes return to `dots`, one number for each warp's columns.
  template <typename OutputOp>
  static __device__ void visit_with_dots(const RowProductParams& p, const Table& table, const RowTile& tile,
                                         int tile_column, const AccTile<Shape>& acc, int rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int kLanes = Out::template kLanes<false>;
    const int column = tile_column + Out::template column<false>();
    const OutputOp output_op(p, tile, column);
    float* const dots =
        p.dots != nullptr ? p.dots + std::int64_t{column / kColumnsPerDot} * p.slots + tile.first : nullptr;
    Out::template visit<false>(acc, device::shared_address(shared), rows, [&](int row, const float4& y, const float4&) {
      const bool present = output_op.left > 0 && row < tile.rows;
      float dot = present ? output_op(row, y, table) : 0.0f;
      if (dots == nullptr) return;
      dot = device::lanes_sum<kLanes>(dot);
      if (present && threadIdx.x % kLanes == 0) dots[row] = dot;
    });
  }
};

}  // namespace mfx::grouped
