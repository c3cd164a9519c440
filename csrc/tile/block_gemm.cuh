// acc += A B by a block: a pipeline brings slices of depth to shared memory, each warp's gemm multiplies its part. What
// another architecture does otherwise is a Pipeline and a WarpGemm of its own under the same mainloop().
#pragma once

#include "ptx/cp_async.cuh"
#include "tile/smem_tile.cuh"

namespace mfx::device {

// A warp's part of the result.
template <typename Shape>
struct AccTile {
  float c[Shape::kRowBlocks][Shape::kColumnBlocks][4] = {};

  // f(row, column, x, y), counted from the block's first, y being the next column's.
  template <typename F>
  __device__ void for_each_pair(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < Shape::kRowBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < Shape::kColumnBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          f(Shape::warp_row() + block * 16 + lane / 4 + i / 2 * 8, Shape::warp_column() + j * 8 + lane % 4 * 2,
            c[block][j][i], c[block][j][i + 1]);
        }
      }
    }
  }
};

// The ring of slices. loader.load(stage, left) copies one slice after the other, `left` being the depth that remains.
template <typename Shape, int kSliceDepth, typename Loader, typename Depth>
class Pipeline {
 public:
  __device__ Pipeline(SharedAddress shared, Loader& loader, Depth depth)
      : shared_(shared), read_(shared), write_(shared), loader_(loader), left_(depth) {
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) prefetch();
  }

  // Waits for the next slice, with one barrier, and begins to copy the one that takes the place of the slice before it.
  // With one stage that is the next itself.
  __device__ SharedAddress next() {
    if constexpr (Shape::kStages == 1) {
      __syncthreads();
      prefetch();
    }
    cp_async_wait<Shape::kStages == 1 ? 0 : Shape::kStages - 2>();
    __syncthreads();
    if constexpr (Shape::kStages > 1) prefetch();
    const SharedAddress stage = read_;
    read_ = after(read_);
    return stage;
  }

 private:
  __device__ SharedAddress after(SharedAddress stage) const {
    return stage == shared_ + (Shape::kStages - 1) * Shape::kStageBytes ? shared_ : stage + Shape::kStageBytes;
  }
  __device__ void prefetch() {
    if (left_ > 0) loader_.load(write_, left_);
    cp_async_commit();
    left_ -= kSliceDepth;
    write_ = after(write_);
  }

  SharedAddress shared_, read_, write_;
  Loader& loader_;
  Depth left_;
};

// A warp's part of the product of one slice. Major: how A and B lie in it.
template <typename Op, typename Shape, Major kA, Major kB>
class WarpGemm {
  using ReaderA = FragmentReader<Op, kA, Side::kA, Shape::kRows, Shape::kDepthBytes>;
  using ReaderB = FragmentReader<Op, kB, Side::kB, Shape::kColumns, Shape::kDepthBytes>;
  static constexpr int kPairs = Shape::kColumnBlocks / 2;  // of column blocks: one B fragment each
  static constexpr int kStepsPerWarp = Shape::kSteps / Shape::kWarpDepth;

 public:
  static constexpr int kSliceDepth = Shape::kSteps * kStepElements<Op>;

  __device__ WarpGemm()
      : a_(Shape::warp_row(), Shape::warp_depth() * kStepsPerWarp),
        b_(Shape::warp_column(), Shape::warp_depth() * kStepsPerWarp) {}

  // acc += A B. Only the warp's first `rows` are multiplied, in blocks of 16, and no more than `depth`.
  __device__ void operator()(AccTile<Shape>& acc, SharedAddress stage, int rows, int depth) const {
    const int steps = (depth + kStepElements<Op> - 1) / kStepElements<Op>;
    if (!kStepByStep<Op> && rows > (Shape::kRowBlocks - 1) * 16 && steps >= Shape::kSteps) {
      multiply_steps<true>(acc, stage, rows, steps);
    } else if (rows > 0) {
      multiply_steps<false>(acc, stage, rows, steps);
    }
  }

 private:
  // Without branches where there is nothing to leave out, so that loads and products of all steps can overlap, unless
  // registers allow one step at a time alone.
  template <bool kWhole>
  __device__ void multiply_steps(AccTile<Shape>& acc, SharedAddress stage, int rows, int steps) const {
    const auto there = [&](int step) { return kWhole || Shape::warp_depth() * kStepsPerWarp + step < steps; };
    if constexpr (kStepByStep<Op>) {
#pragma unroll 1
      for (int step = 0; step < kStepsPerWarp && there(step); ++step) multiply_one<kWhole>(acc, stage, rows, step);
    } else {
#pragma unroll
      for (int step = 0; step < kStepsPerWarp && there(step); ++step) multiply_one<kWhole>(acc, stage, rows, step);
    }
  }

  template <bool kWhole>
  __device__ void multiply_one(AccTile<Shape>& acc, SharedAddress stage, int rows, int step) const {
    Fragment<Op, 4> b[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) b[j] = b_.read(stage + Shape::kABytes, j, step);
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
      if (!kWhole && i * 16 >= rows) break;
      const Fragment<Op, 4> a = a_.read(stage, i, step);
#pragma unroll
      for (int j = 0; j < Shape::kColumnBlocks; ++j) multiply<Op>(acc.c[i][j], a, b[j / 2], j % 2 * 2);
    }
  }

  ReaderA a_;
  ReaderB b_;
};

// Ends with a barrier: shared memory is free again.
template <typename Gemm, typename Shape, typename Loader, typename Depth>
__device__ void mainloop(AccTile<Shape>& acc, const Gemm& gemm, SharedAddress shared, Loader&& loader, Depth depth,
                         int rows) {
  constexpr int kSlice = Gemm::kSliceDepth;
  Pipeline<Shape, kSlice, std::remove_reference_t<Loader>, Depth> pipeline(shared, loader, depth);
  for (Depth k = 0; k < depth; k += kSlice) {
    const SharedAddress stage = pipeline.next();
    gemm(acc, stage, rows, static_cast<int>(sizeof(Depth) > 4 ? min(depth - k, Depth{kSlice}) : depth - k));
  }
  __syncthreads();
}

}  // namespace mfx::device
