// From accumulators to rows: a warp turns its blocks of 16 rows in shared memory, so that lanes hold four neighbouring
// columns and memory sees whole sectors. Where warps share the depth, their sums meet here, in the warps' order.
#pragma once

#include "grouped_gemm/slice_loader.cuh"
#include "grouped_gemm/vector4.cuh"

namespace mfx::grouped {

// How the lanes' sums lie in shared memory: mma's columns in their order, pairs of a lane side by side.
struct LanePairs {
  // Where chunk `chunk` of four columns of a row is.
  static constexpr __device__ int chunk(int chunk) { return chunk; }

  // Where this lane's sums of 16 rows begin, in floats from the first row, and how it stores them there.
  template <int kPitch>
  static __device__ int begin() {
    const int lane = threadIdx.x % 32;
    return lane / 4 * kPitch + lane % 4 * 2;
  }
  template <int kPitch, int kBlocks>
  static __device__ void store(const float (&c)[kBlocks][4], SharedAddress to) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      device::store_shared_64(to + j * 8 * 4, c[j][0], c[j][1]);
      device::store_shared_64(to + j * 8 * 4 + 8 * kPitch * 4, c[j][2], c[j][3]);
    }
  }
};

template <typename Shape, typename Order = LanePairs>
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
    const SharedAddress to = first + (group * kFloats + Order::template begin<kPitch>()) * 4;
#pragma unroll
    for (int block = 0; block < Shape::kRowBlocks; ++block) {
      if (block * 16 >= rows) break;
      Order::template store<kPitch>(sums.c[block], to + block * 16 * kPitch * 4);
    }
    if constexpr (Shape::kWarpDepth > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    const int first_row = (group * 32 + lane) / kLanes<kFolded>;
    const int own = Order::chunk(lane % kLanes<kFolded>);
    const int partner_bytes = (Order::chunk(lane % kLanes<kFolded> + kLanes<kFolded>) - own) * kVector * 4;
    SharedAddress from = first + (first_row * kPitch + own * kVector) * 4;
#pragma unroll 2
    for (int begin = group * 32 / kLanes<kFolded>; begin < rows; begin += kRowsPerPass<kFolded>) {
      const float4 total = sum(from), partner = kFolded ? sum(from + partner_bytes) : float4{};
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
