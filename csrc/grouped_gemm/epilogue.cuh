// From accumulators to rows: a warp turns its blocks of 16 rows in shared memory, so that lanes hold four neighbouring
// columns and memory sees whole sectors. Where warps share the depth, their sums meet here, in the warps' order.
#pragma once

#include "grouped_gemm/slice_loader.cuh"
#include "grouped_gemm/vector4.cuh"

namespace mfx::grouped {

template <typename Shape>
class Epilogue {
  // The pitch sends the eight rows of a store, and the lanes of a load, to different banks.
  static constexpr int kPitch = Shape::kColumnsPerWarp + 8;
  static constexpr int kFloats = Shape::kRowsPerWarp * kPitch;

 public:
  static constexpr int kSharedBytes = Shape::kWarps * kFloats * static_cast<int>(sizeof(float));

  // Columns that are visited: with kFolded only the first half of each warp's, whose partners are as many further on.
  template <bool kFolded>
  static constexpr int kColumns = kFolded ? Shape::kColumnsPerWarp / 2 : Shape::kColumnsPerWarp;
  // Lanes that visit a row.
  template <bool kFolded>
  static constexpr int kLanes = kColumns<kFolded> / kVector;

  // Rows that the warps of one piece visit at a time.
  template <bool kFolded>
  static constexpr int kRowsPerPass = 32 * Shape::kWarpDepth / kLanes<kFolded>;
  // The first row that this lane visits, counted from the tile's first.
  template <bool kFolded>
  static __device__ int first_row() {
    return Shape::warp_row() + (Shape::warp_depth() * 32 + threadIdx.x % 32) / kLanes<kFolded>;
  }

  // The first of the four columns that this lane visits, counted from the tile's first.
  template <bool kFolded>
  static __device__ int column() {
    return Shape::warp_column() / Shape::kColumnsPerWarp * kColumns<kFolded> + threadIdx.x % kLanes<kFolded> * kVector;
  }

  // f(row, sums, partner's sums) for this lane's columns in the warp's first `rows` rows, counted from the tile's
  // first. The whole warp visits together: up to the next multiple of the rows that it visits at a time.
  template <bool kFolded, typename F>
  static __device__ void visit(const AccTile<Shape>& sums, SharedAddress shared, int rows, F f) {
    const int lane = threadIdx.x % 32, group = Shape::warp_depth();
    const SharedAddress first = shared + (Shape::warp() - group) * kFloats * 4;
    const SharedAddress to = first + (group * kFloats + lane / 4 * kPitch + lane % 4 * 2) * 4;
#pragma unroll
    for (int block = 0; block < Shape::kRowBlocks; ++block) {
      if (block * 16 >= rows) break;
#pragma unroll
      for (int j = 0; j < Shape::kColumnBlocks; ++j) {
        const float (&c)[4] = sums.c[block][j];
        const SharedAddress at = to + (block * 16 * kPitch + j * 8) * 4;
        device::store_shared_64(at, c[0], c[1]);
        device::store_shared_64(at + 8 * kPitch * 4, c[2], c[3]);
      }
    }
    if constexpr (Shape::kWarpDepth > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    const int first_row = (group * 32 + lane) / kLanes<kFolded>;
    SharedAddress from = first + (first_row * kPitch + lane % kLanes<kFolded> * kVector) * 4;
#pragma unroll 2
    for (int begin = group * 32 / kLanes<kFolded>; begin < rows; begin += kRowsPerPass<kFolded>) {
      const float4 total = sum(from), partner = kFolded ? sum(from + kColumns<kFolded> * 4) : float4{};
      f(Shape::warp_row() + begin + lane / kLanes<kFolded>, total, partner);
      from += kRowsPerPass<kFolded> * kPitch * 4;
    }
  }

 private:
  static __device__ float4 sum(SharedAddress from) {
    float4 total = device::load_shared_float4(from);
#pragma unroll
    for (int w = 1; w < Shape::kWarpDepth; ++w) total = total + device::load_shared_float4(from + w * kFloats * 4);
    return total;
  }
};

// Where a tile's columns lie in a matrix of two halves that a gated activation folds: each warp's columns are half of
// one and half of the other, so that partners meet in one warp.
template <typename Shape>
struct GatedColumns {
  static constexpr int kHalf = Shape::kColumnsPerWarp / 2;
  static __device__ int within_half(int column) { return column / Shape::kColumnsPerWarp * kHalf + column % kHalf; }
  static __device__ bool second_half(int column) { return column % Shape::kColumnsPerWarp >= kHalf; }
};

}  // namespace mfx::grouped
