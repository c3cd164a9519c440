// Global to shared memory: one slice of an operand per call, zeros where rows, columns or depth end.
//
// Aligned operands (16 bytes, rows included) are copied asynchronously; others element by element, through registers.
#pragma once

#include "grouped_gemm/kernel_params.cuh"
#include "tile/block_gemm.cuh"
#include "tile/chunk.cuh"

namespace mfx::grouped {

using device::AccTile;
using device::copy_chunk;
using device::Major;
using device::Partial;
using device::SharedAddress;
using device::SmemTile;
using device::Storage;
using device::WarpGemm;

__device__ inline int bytes_of_chunk(int bytes_left) {
  return min(max(bytes_left, 0), 16);
}

// Rows whose depth is contiguous; the rows stay, the depth advances.
template <typename T, typename Shape, int kSpan, bool kAligned>
class RowLoader {
  using S = SmemTile<T, Major::kK, kSpan, Shape::kDepthBytes>;
  static constexpr int kLanes = S::kRowBytes / 16;
  static constexpr int kRowsPerPass = Shape::kThreads / kLanes, kPasses = kSpan / kRowsPerPass;
  static_assert(kPasses >= 1 && kSpan % kRowsPerPass == 0, "all threads copy in all passes");

 public:
  static constexpr int kDepth = S::kDepth;

  // row_of(i): the address of row i, which has(i) says to exist; the first one does.
  template <typename RowOf, typename Has>
  __device__ RowLoader(int depth, RowOf row_of, Has has) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    bytes_left_ = depth * static_cast<int>(sizeof(T)) - chunk * 16;
    to_ = S::offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool present = has(row + i * kRowsPerPass);
      from_[i] = row_of(present ? row + i * kRowsPerPass : 0) + chunk * 16;
      bytes_[i] = present ? 16 : 0;
      device::pin_in_register(from_[i]);
      device::pin_in_register(bytes_[i]);
    }
    device::pin_in_register(to_);
  }

  // kWhole: the depth does not end in this slice.
  template <bool kWhole>
  __device__ void load(SharedAddress slice) {
    const int bytes = bytes_of_chunk(bytes_left_);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_chunk<T, Partial::kMaybe>(slice + to_ + i * kRowsPerPass * S::kRowBytes, from_[i] + read_,
                                     kWhole ? bytes_[i] : min(bytes, bytes_[i]), std::bool_constant<kAligned>());
    }
    read_ += Shape::kDepthBytes;
    bytes_left_ -= Shape::kDepthBytes;
  }

 private:
  const char* from_[kPasses];
  std::int32_t bytes_[kPasses];
  std::int64_t read_ = 0;
  int bytes_left_;
  std::uint32_t to_;
};

// The part of a thread in copying rows of depth, whose columns are columns (or rows) of the result: some chunks of
// every kRowsPerPass-th row.
template <typename T, typename Shape, int kSpan, bool kAligned>
class DepthRows {
  using S = typename device::SliceOf<Shape, T, Major::kMN, kSpan>::Tile;
  static constexpr int kChunk = 16 / sizeof(T);                              // elements
  static constexpr int kLanes = S::kRowBytes < 128 ? S::kRowBytes / 16 : 8;  // eight lanes meet all banks
  static constexpr int kChunkPasses = S::kRowBytes / 16 / kLanes;

 public:
  static constexpr int kDepth = S::kDepth;
  static constexpr int kRowsPerPass = Shape::kThreads / kLanes, kPasses = kDepth / kRowsPerPass;
  static_assert(kPasses >= 1 && kDepth % kRowsPerPass == 0, "all threads copy in all passes");

  static __device__ int first_row() { return threadIdx.x / kLanes; }

  // column_of(i): where the columns from i on come from; columns_left(i): how many of them there are.
  template <typename ColumnOf, typename ColumnsLeft>
  __device__ DepthRows(ColumnOf column_of, ColumnsLeft columns_left) {
    to_ = S::offset(first_row(), threadIdx.x % kLanes);
#pragma unroll
    for (int c = 0; c < kChunkPasses; ++c) {
      const int column = (threadIdx.x % kLanes + c * kLanes) * kChunk;
      from_[c] = column_of(column);
      bytes_[c] = bytes_of_chunk(columns_left(column) * static_cast<int>(sizeof(T)));
      device::pin_in_register(from_[c]);
      device::pin_in_register(bytes_[c]);
    }
    device::pin_in_register(to_);
  }

  // The row of a pass, `offset` bytes from the first.
  __device__ void copy(SharedAddress slice, int pass, std::int64_t offset, bool present) const {
#pragma unroll
    for (int c = 0; c < kChunkPasses; ++c) {
      copy_chunk<T, Partial::kMaybe>(slice + to_ + pass * kRowsPerPass * S::kRowPitch + c * S::kGroupPitch,
                                     from_[c] + offset, present ? bytes_[c] : 0, std::bool_constant<kAligned>());
    }
  }

 private:
  const char* from_[kChunkPasses];
  std::int32_t bytes_[kChunkPasses];
  std::uint32_t to_;
};

// Consecutive rows of one matrix.
template <typename T, typename Shape, int kSpan, bool kAligned>
class MatrixLoader {
  using Rows = DepthRows<T, Shape, kSpan, kAligned>;

 public:
  template <typename ColumnOf, typename ColumnsLeft>
  __device__ MatrixLoader(std::int64_t row_bytes, int depth, ColumnOf column_of, ColumnsLeft columns_left)
      : rows_(column_of, columns_left), slice_bytes_(Rows::kDepth * row_bytes), row_(Rows::first_row()), depth_(depth) {
#pragma unroll
    for (int i = 0; i < Rows::kPasses; ++i) offset_[i] = (row_ + i * Rows::kRowsPerPass) * row_bytes;
  }

  template <bool kWhole>
  __device__ void load(SharedAddress slice) {
#pragma unroll
    for (int i = 0; i < Rows::kPasses; ++i) {
      rows_.copy(slice, i, offset_[i], kWhole || row_ + i * Rows::kRowsPerPass < depth_);
      offset_[i] += slice_bytes_;
    }
    row_ += Rows::kDepth;
  }

 private:
  Rows rows_;
  std::int64_t offset_[Rows::kPasses];
  std::int64_t slice_bytes_;
  int row_, depth_;
};

// Left and right operand of a slice by loaders of their own.
template <typename Shape, typename Left, typename Right>
struct BothOperands {
  Left& left;
  Right& right;

  __device__ void load(SharedAddress stage, int depth) {
    depth >= Left::kDepth ? copy<true>(stage) : copy<false>(stage);
  }
  template <bool kWhole>
  __device__ void copy(SharedAddress stage) {
    left.template load<kWhole>(stage);
    right.template load<kWhole>(stage + Shape::kABytes);
  }
};

}  // namespace mfx::grouped
