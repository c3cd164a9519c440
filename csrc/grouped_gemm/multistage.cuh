// The main loop: slices arrive kStages - 1 ahead of the tensor cores, one barrier per slice.
#pragma once

#include "grouped_gemm/slice_loader.cuh"

namespace mfx::grouped {

template <typename Shape>
struct Accumulators {
  float c[Shape::kRowBlocks][Shape::kColumnBlocks][4] = {};
};

template <typename Math, typename Shape, Major kLeft, Major kRight>
class Multistage {
  using LeftReader = FragmentReader<Math, kLeft, Side::kLeft, Shape::kRows, Shape::kDepthBytes>;
  using RightReader = FragmentReader<Math, kRight, Side::kRight, Shape::kColumns, Shape::kDepthBytes>;
  static constexpr int kPairs = Shape::kColumnBlocks / 2;  // of column blocks: one right operand each
  static constexpr int kStepsPerWarp = Shape::kSteps / Shape::kWarpDepth;
  static constexpr int kStepDepth = 32 / sizeof(typename Math::T);

 public:
  __device__ explicit Multistage(SharedAddress shared)
      : shared_(shared),
        left_(Shape::warp_row(), Shape::warp_depth() * kStepsPerWarp),
        right_(Shape::warp_column(), Shape::warp_depth() * kStepsPerWarp) {}

  // Adds left x right to `sums`. Only the warp's first `rows` are multiplied, in blocks of 16, and no more depth than
  // there is. Ends with a barrier: shared memory is free again.
  template <typename Loader>
  __device__ void run(Accumulators<Shape>& sums, Loader&& loader, int depth, int rows) const {
    constexpr int kSliceDepth = Shape::kSteps * kStepDepth;
    const int slices = (depth + kSliceDepth - 1) / kSliceDepth;
    SharedAddress read = shared_, write = shared_;
    const auto next = [&](SharedAddress stage) {
      return stage == shared_ + (Shape::kStages - 1) * Shape::kStageBytes ? shared_ : stage + Shape::kStageBytes;
    };
    const auto load = [&](int slice) {
      if (slice < depth / kSliceDepth) {
        loader.template load<true>(write);
      } else if (slice < slices) {
        loader.template load<false>(write);
      }
      device::cp_async_commit();
      write = next(write);
    };
    for (int slice = 0; slice < Shape::kStages - 1; ++slice) load(slice);
    for (int slice = 0; slice < slices; ++slice) {
      device::cp_async_wait<Shape::kStages - 2>();
      __syncthreads();
      load(slice + Shape::kStages - 1);
      const int steps = (depth - slice * kSliceDepth + kStepDepth - 1) / kStepDepth;
      if (Math::kStepsOverlap && rows > (Shape::kRowBlocks - 1) * 16 && steps >= Shape::kSteps) {
        multiply<true>(sums, read, rows, steps);
      } else if (rows > 0) {
        multiply<false>(sums, read, rows, steps);
      }
      read = next(read);
    }
    __syncthreads();
  }

 private:
  // Without branches where there is nothing to leave out, so that loads and products of all steps can overlap.
  template <bool kWhole>
  __device__ void multiply(Accumulators<Shape>& sums, SharedAddress stage, int rows, int steps) const {
    if constexpr (Math::kStepsOverlap) {
#pragma unroll
      for (int step = 0; step < kStepsPerWarp; ++step) {
        if (!kWhole && Shape::warp_depth() * kStepsPerWarp + step >= steps) break;
        multiply_step<kWhole>(sums, stage, rows, step);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < kStepsPerWarp; ++step) {
        if (!kWhole && Shape::warp_depth() * kStepsPerWarp + step >= steps) break;
        multiply_step<kWhole>(sums, stage, rows, step);
      }
    }
  }

  template <bool kWhole>
  __device__ void multiply_step(Accumulators<Shape>& sums, SharedAddress stage, int rows, int step) const {
    typename Math::Operand b[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) b[j] = right_.read(stage + Shape::kLeftBytes, j, step);
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
      if (!kWhole && i * 16 >= rows) break;
      const typename Math::Operand a = left_.read(stage, i, step);
#pragma unroll
      for (int j = 0; j < Shape::kColumnBlocks; ++j) Math::multiply(sums.c[i][j], a, b[j / 2], j % 2);
    }
  }

  SharedAddress shared_;
  LeftReader left_;
  RightReader right_;
};

}  // namespace mfx::grouped
