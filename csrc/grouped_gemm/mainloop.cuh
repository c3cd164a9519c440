// acc += A B, slice by slice of depth: a pipeline brings slices to shared memory, a warp's gemm multiplies them.
#pragma once

#include "grouped_gemm/slice_loader.cuh"

namespace mfx::grouped {

template <typename Shape>
struct Accumulators {
  float c[Shape::kRowBlocks][Shape::kColumnBlocks][4] = {};
};

// The ring of kStages slices. `loader` copies one slice after the other: load<kWhole>(stage).
template <typename Shape, int kSliceDepth, typename Loader>
class Pipeline {
 public:
  __device__ Pipeline(SharedAddress shared, Loader& loader, int depth)
      : shared_(shared), read_(shared), write_(shared), loader_(loader), depth_(depth) {
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) prefetch();
  }

  // Waits for the next slice, with one barrier, and orders the one that takes the place of the slice before it.
  __device__ SharedAddress next() {
    device::cp_async_wait<Shape::kStages - 2>();
    __syncthreads();
    prefetch();
    const SharedAddress stage = read_;
    read_ = after(read_);
    return stage;
  }

 private:
  __device__ SharedAddress after(SharedAddress stage) const {
    return stage == shared_ + (Shape::kStages - 1) * Shape::kStageBytes ? shared_ : stage + Shape::kStageBytes;
  }
  __device__ void prefetch() {
    if (ordered_ + kSliceDepth <= depth_) {
      loader_.template load<true>(write_);
    } else if (ordered_ < depth_) {
      loader_.template load<false>(write_);
    }
    device::cp_async_commit();
    ordered_ += kSliceDepth;
    write_ = after(write_);
  }

  SharedAddress shared_, read_, write_;
  Loader& loader_;
  int depth_, ordered_ = 0;
};

// A warp's part of the product of one slice. Major: how A and B lie in it.
template <typename Math, typename Shape, Major kA, Major kB>
class WarpGemm {
  using ReaderA = FragmentReader<Math, kA, Side::kA, Shape::kRows, Shape::kDepthBytes>;
  using ReaderB = FragmentReader<Math, kB, Side::kB, Shape::kColumns, Shape::kDepthBytes>;
  static constexpr int kPairs = Shape::kColumnBlocks / 2;  // of column blocks: one B fragment each
  static constexpr int kStepsPerWarp = Shape::kSteps / Shape::kWarpDepth;
  static constexpr int kStepDepth = 32 / sizeof(typename Math::T);

 public:
  static constexpr int kSliceDepth = Shape::kSteps * kStepDepth;

  __device__ WarpGemm()
      : a_(Shape::warp_row(), Shape::warp_depth() * kStepsPerWarp),
        b_(Shape::warp_column(), Shape::warp_depth() * kStepsPerWarp) {}

  // acc += A B. Only the warp's first `rows` are multiplied, in blocks of 16, and no more than `depth`.
  __device__ void operator()(Accumulators<Shape>& acc, SharedAddress stage, int rows, int depth) const {
    const int steps = (depth + kStepDepth - 1) / kStepDepth;
    if (Math::kStepsOverlap && rows > (Shape::kRowBlocks - 1) * 16 && steps >= Shape::kSteps) {
      multiply<true>(acc, stage, rows, steps);
    } else if (rows > 0) {
      multiply<false>(acc, stage, rows, steps);
    }
  }

 private:
  // Without branches where there is nothing to leave out, so that loads and products of all steps can overlap.
  template <bool kWhole>
  __device__ void multiply(Accumulators<Shape>& acc, SharedAddress stage, int rows, int steps) const {
    if constexpr (Math::kStepsOverlap) {
#pragma unroll
      for (int step = 0; step < kStepsPerWarp; ++step) {
        if (!kWhole && Shape::warp_depth() * kStepsPerWarp + step >= steps) break;
        multiply_step<kWhole>(acc, stage, rows, step);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < kStepsPerWarp; ++step) {
        if (!kWhole && Shape::warp_depth() * kStepsPerWarp + step >= steps) break;
        multiply_step<kWhole>(acc, stage, rows, step);
      }
    }
  }

  template <bool kWhole>
  __device__ void multiply_step(Accumulators<Shape>& acc, SharedAddress stage, int rows, int step) const {
    typename Math::Operand b[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) b[j] = b_.read(stage + Shape::kABytes, j, step);
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
      if (!kWhole && i * 16 >= rows) break;
      const typename Math::Operand a = a_.read(stage, i, step);
#pragma unroll
      for (int j = 0; j < Shape::kColumnBlocks; ++j) Math::multiply(acc.c[i][j], a, b[j / 2], j % 2);
    }
  }

  ReaderA a_;
  ReaderB b_;
};

// Ends with a barrier: shared memory is free again.
template <typename Gemm, typename Shape, typename Loader>
__device__ void mainloop(Accumulators<Shape>& acc, const Gemm& gemm, SharedAddress shared, Loader&& loader, int depth,
                         int rows) {
  Pipeline<Shape, Gemm::kSliceDepth, std::remove_reference_t<Loader>> pipeline(shared, loader, depth);
  for (int k = 0; k < depth; k += Gemm::kSliceDepth) {
    const SharedAddress stage = pipeline.next();
    gemm(acc, stage, rows, depth - k);
  }
  __syncthreads();
}

}  // namespace mfx::grouped
