// A block's query rows, a tile of them for each warpgroup that multiplies, and how these lie in shared memory for
// wgmma: boxes of 64 columns of the head dimension.
#pragma once

#include "stick_attention/tile_loader.cuh"
#include "tile/slice_ring.cuh"
#include "tile/warpgroup_boxes.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::stick {

// As many as registers hold, since each of them waits for its own products.
template <int kDim>
struct RowWarpgroups {
  static constexpr int kCount = kDim <= 64 ? 3 : device::kMultiplyingWarpgroups;
  static constexpr int kThreads = (1 + kCount) * device::kWarpgroup;
  static constexpr int kLoadingRegisters = kCount == 3 ? 56 : device::kLoadingRegisters;

  template <typename Load, typename Multiply>
  static __device__ void take_roles(Load&& load, Multiply&& multiply) {
    device::take_roles<kCount, kLoadingRegisters>(load, multiply);
  }
};

template <typename T, int kDim>
struct RowBoxes {
  static constexpr int kRows = kStickTileRows, kColumns = 64;  // of a box
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kBoxBytes = kRows * device::kBoxRowBytes, kBytes = kRows * kRowBytes;

  // Calls each(box, its first column).
  template <typename Each>
  static __device__ void each(device::SharedAddress boxes, Each&& each) {
#pragma unroll
    for (int column = 0; column < kDim; column += kColumns) each(boxes + column / kColumns * kBoxBytes, column);
  }

  // Starts to copy the rows of `tile`, their columns from `first` on, with all threads of the warpgroup, `thread` being
  // this one's number there.
  static __device__ void load(device::SharedAddress boxes, const StickAttentionProblem& p, const BlockInfo& tile,
                              const void* tensor, const StickQueryStrides& strides, bool aligned, int thread,
                              int first = 0) {
    each(boxes, [&](device::SharedAddress box, int column) {
      const TileLoader<T, device::kBoxRowBytes, device::kWarpgroup> copy(p.head_dim - first - column, thread);
      copy.template rows<kRows>(box, {tensor, strides, p, tile.s, tile.head, tile.first_row, first + column}, aligned);
    });
  }
};

}  // namespace mfx::stick
