// From a warpgroup's accumulators to rows: what epilogue.cuh is to sm_80. Each warp turns its 16 rows of a block of 64
// in shared memory of its own, half the columns at a time, so that lanes hold four neighbouring columns and memory sees
// whole sectors.
#pragma once

#include "grouped_gemm/vector4.cuh"
#include "tile/static_for.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace mfx::grouped {

class WarpgroupEpilogue {
  using Shape = device::WarpgroupShape;
  static constexpr int kStaged = 64;          // columns at a time
  static constexpr int kPitch = kStaged + 8;  // sends the eight rows of a store to different banks
  static constexpr int kParts = Shape::kColumns / kStaged, kPieces = kParts * Shape::kRowBlocks;

 public:
  static constexpr int kBytesPerWarp = 16 * kPitch * 4;
  static constexpr int kColumnsPerPart = kStaged;  // of the result, folded or not

  // Columns of the rows that leave: with kFolded those of the first 64 columns, whose partners are as many further on.
  template <bool kFolded>
  static constexpr int kColumns = kFolded ? kStaged / 2 : kStaged;
  template <bool kFolded>
  static constexpr int kLanes = kColumns<kFolded> / kVector;

  // The tile's row that is row `row` of this warp's 16 in a block.
  static __device__ int row_of(int block, int row) { return block * 64 + threadIdx.x % 128 / 32 * 16 + row; }

  // visitor(column)(row, sums, partner's sums) for each four columns and each row below `rows`, counted from the tile's
  // first; lanes beyond `rows` take part with rows that do not exist. `shared` is the warp's own.
  template <bool kFolded, typename Visitor>
  static __device__ void visit(const device::WarpgroupAcc& acc, device::SharedAddress shared, int rows,
                               Visitor visitor) {
    constexpr int kPass = 32 / kLanes<kFolded>;  // rows at a time
    const int lane = device::lane_id();
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      const int block = piece % Shape::kRowBlocks, part = piece / Shape::kRowBlocks;
      if (row_of(block, 0) >= rows) continue;
      device::static_for<kPieces>([&](auto i) {
        if (piece == i) stage<kFolded, i % Shape::kRowBlocks, i / Shape::kRowBlocks>(acc, shared);
      });
      __syncwarp();
      auto four_columns = visitor(part * kColumns<kFolded> + lane % kLanes<kFolded> * kVector);
#pragma unroll 2
      for (int row = lane / kLanes<kFolded>; row < 16; row += kPass) {
        const device::SharedAddress from = shared + (row * kPitch + lane % kLanes<kFolded> * kVector) * 4;
        const float4 sums = device::load_shared_float4(from);
        const float4 partner = kFolded ? device::load_shared_float4(from + kColumns<kFolded> * 4) : float4{};
        four_columns(row_of(block, row), sums, partner);
      }
      __syncwarp();
    }
  }

 private:
  template <bool kFolded, int kBlock, int kPart>
  static __device__ void stage(const device::WarpgroupAcc& acc, device::SharedAddress shared) {
    const int lane = device::lane_id();
    const device::SharedAddress to = shared + (lane / 4 * kPitch + lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < kStaged / 8; ++j) {
      constexpr int kHalf = kStaged / 16;  // blocks of eight columns
      const int from = kFolded ? j / kHalf * 8 + kPart * kHalf + j % kHalf : kPart * 8 + j;
      const float* const c = &acc.c[kBlock][4 * from];
      device::store_shared_64(to + j * 8 * 4, c[0], c[1]);
      device::store_shared_64(to + (8 * kPitch + j * 8) * 4, c[2], c[3]);
    }
  }
};

}  // namespace mfx::grouped
