// Global to shared memory: one slice of an operand per call, zeros where rows, columns or depth end.
//
// Aligned operands (16 bytes, rows included) are copied asynchronously; others element by element, through registers.
#pragma once

#include "device/cp_async.cuh"
#include "grouped_gemm/kernel_params.cuh"
#include "grouped_gemm/tile.cuh"

namespace mfx::grouped {

// `bytes` of the 16 at `from`, whole elements.
template <typename T, bool kAligned>
__device__ void copy_chunk(SharedAddress to, const char* from, int bytes) {
  if constexpr (kAligned) {
    device::cp_async<16>(to, from, bytes);
  } else {
    constexpr int kElements = 16 / sizeof(T);
    union {
      T elements[kElements];
      uint4 vector;
    } chunk;
    chunk.vector = {};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i * static_cast<int>(sizeof(T)) < bytes) chunk.elements[i] = reinterpret_cast<const T*>(from)[i];
    }
    device::store_shared_128(to, chunk.vector);
  }
}

__device__ inline int bytes_of_chunk(int bytes_left) {
  return min(max(bytes_left, 0), 16);
}

// Rows whose depth is contiguous; the rows stay, the depth advances.
template <typename Math, typename Shape, int kSpan, bool kAligned>
class DepthMajorLoader {
  using T = typename Math::T;
  using S = Slice<Math, Major::kDepth, kSpan, Shape::kDepthBytes>;
  static constexpr int kLanes = S::kRowBytes / 16;
  static constexpr int kRowsPerPass = Shape::kThreads / kLanes, kPasses = kSpan / kRowsPerPass;
  static_assert(kPasses >= 1 && kSpan % kRowsPerPass == 0, "all threads copy in all passes");

 public:
  // row_of(i): the address of row i < rows.
  template <typename RowOf>
  __device__ DepthMajorLoader(int rows, int depth, RowOf row_of) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    bytes_left_ = depth * static_cast<int>(sizeof(T)) - chunk * 16;
    to_ = S::offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool present = row + i * kRowsPerPass < rows;
      from_[i] = row_of(present ? row + i * kRowsPerPass : 0) + chunk * 16;
      bytes_[i] = present ? 16 : 0;
      device::keep(from_[i]);
      device::keep(bytes_[i]);
    }
    device::keep(to_);
  }

  // kWhole: the depth does not end in this slice.
  template <bool kWhole>
  __device__ void load(SharedAddress slice) {
    const int bytes = bytes_of_chunk(bytes_left_);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_chunk<T, kAligned>(slice + to_ + i * kRowsPerPass * S::kRowBytes, from_[i] + read_,
                              kWhole ? bytes_[i] : min(bytes, bytes_[i]));
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

// Rows of depth whose columns are columns (or rows) of the result; the columns stay, the rows advance. `Source` says
// where a row lies, in two steps: its Place one slice ahead, because that may have to be read, then the offset.
template <typename Math, typename Shape, int kSpan, bool kAligned, typename Source>
class ResultMajorLoader {
  using T = typename Math::T;
  using S = Slice<Math, Major::kResult, kSpan, Shape::kDepthBytes>;
  static constexpr int kChunk = 16 / sizeof(T);                              // elements
  static constexpr int kLanes = S::kRowBytes < 128 ? S::kRowBytes / 16 : 8;  // eight lanes meet all banks
  static constexpr int kChunkPasses = S::kRowBytes / 16 / kLanes;
  static constexpr int kRowsPerPass = Shape::kThreads / kLanes, kPasses = S::kDepth / kRowsPerPass;
  static_assert(kPasses >= 1 && S::kDepth % kRowsPerPass == 0, "all threads copy in all passes");

 public:
  // column_of(i): where the columns from i on come from; columns_left(i): how many of them there are.
  template <typename ColumnOf, typename ColumnsLeft>
  __device__ ResultMajorLoader(const Source& source, int depth, ColumnOf column_of, ColumnsLeft columns_left)
      : source_(source), row_(threadIdx.x / kLanes), depth_(depth) {
    to_ = S::offset(row_, threadIdx.x % kLanes);
#pragma unroll
    for (int c = 0; c < kChunkPasses; ++c) {
      const int column = (threadIdx.x % kLanes + c * kLanes) * kChunk;
      from_[c] = column_of(column);
      bytes_[c] = bytes_of_chunk(columns_left(column) * static_cast<int>(sizeof(T)));
      device::keep(from_[c]);
      device::keep(bytes_[c]);
    }
    device::keep(to_);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) at_[i] = source_.first(row_ + i * kRowsPerPass, depth_);
  }

  template <bool kWhole>
  __device__ void load(SharedAddress slice) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool present = kWhole || row_ + i * kRowsPerPass < depth_;
      const std::int64_t offset = source_.offset(at_[i]);
#pragma unroll
      for (int c = 0; c < kChunkPasses; ++c) {
        copy_chunk<T, kAligned>(slice + to_ + i * kRowsPerPass * S::kRowBytes + c * kLanes * 16, from_[c] + offset,
                                present ? bytes_[c] : 0);
      }
    }
    row_ += S::kDepth;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) at_[i] = source_.next(at_[i], row_ + i * kRowsPerPass, depth_);
  }

 private:
  Source source_;
  const char* from_[kChunkPasses];
  std::int32_t bytes_[kChunkPasses];
  typename Source::Place at_[kPasses];
  int row_, depth_;
  std::uint32_t to_;
};

// Rows of one matrix.
struct MatrixRows {
  using Place = std::int64_t;  // bytes
  std::int64_t row_bytes, slice_bytes;

  __device__ Place first(int row, int) const { return row * row_bytes; }
  __device__ Place next(Place place, int, int) const { return place + slice_bytes; }
  __device__ std::int64_t offset(Place place) const { return place; }
};

// Rows of one expert's positions.
struct RoutedDepth {
  using Place = std::int32_t;  // as RowMap fetches it
  const RowMap& map;
  std::int32_t begin;

  __device__ Place first(int row, int depth) const { return row < depth ? map.fetch(begin + row) : 0; }
  __device__ Place next(Place, int row, int depth) const { return first(row, depth); }
  __device__ std::int64_t offset(Place slot) const { return map.offset(slot); }
};

}  // namespace mfx::grouped
