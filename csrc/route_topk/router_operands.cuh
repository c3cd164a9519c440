// The matrices of the gate network as operands of block_product.cuh: of any storage type, in segments, contiguous along
// the rows of the product or along its inner index.
#pragma once

#include <cstdint>

#include "core/dtype_of.hpp"
#include "moduleformer_ext/route_topk.hpp"
#include "ptx/convert.cuh"
#include "ptx/vector_memory.cuh"
#include "tile/segments.cuh"
#include "tile/smem_tile.cuh"

namespace mfx::router {

__device__ inline float load(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kBFloat16) return device::to_float(static_cast<const BFloat16*>(data)[i]);
  if (dtype == DType::kFloat16) return device::to_float(static_cast<const Float16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

__device__ inline void store(void* data, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(data)[i] = device::from_float<BFloat16>(value);
  } else if (dtype == DType::kFloat16) {
    static_cast<Float16*>(data)[i] = device::from_float<Float16>(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

// Two neighbours of a row, at once where their address allows; or the first, where not `both` are there.
__device__ inline void store_pair(float* to, float x, float y, bool both) {
  if (both && reinterpret_cast<std::uintptr_t>(to) % 8 == 0) {
    device::store_global_64(to, x, y);
  } else {
    to[0] = x;
    if (both) to[1] = y;
  }
}
template <typename T>
__device__ inline void store_pair(T* to, float x, float y, bool both) {
  if (both && reinterpret_cast<std::uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<std::uint32_t*>(to) = device::pack_pair<T>(x, y);
  } else {
    to[0] = device::from_float<T>(x);
    if (both) to[1] = device::from_float<T>(y);
  }
}
__device__ inline void store_pair(void* data, DType dtype, std::int64_t i, float x, float y, bool both) {
  if (dtype == DType::kBFloat16) return store_pair(static_cast<BFloat16*>(data) + i, x, y, both);
  if (dtype == DType::kFloat16) return store_pair(static_cast<Float16*>(data) + i, x, y, both);
  store_pair(static_cast<float*>(data) + i, x, y, both);
}

// Of an element; float64 has no CUDA kernels.
__device__ inline int bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? sizeof(float) : sizeof(BFloat16);
}

// The rows of W, one per expert, or those of its gradient.
struct ExpertRows : device::Segments<32> {
  DType dtype;
  bool aligned;  // all segments, to 16 bytes

  // The segment of a row, which then counts from the segment's start.
  __device__ void* segment_of(std::int64_t& row) const {
    const int s = find(static_cast<std::int32_t>(row));
    row -= first[s];
    return data[s];
  }
};

// Results and everything between them are float32.
__host__ __device__ inline float* floats(void* data) {
  return static_cast<float*>(data);
}
__host__ __device__ inline const float* floats(const void* data) {
  return static_cast<const float*>(data);
}

// A matrix in memory as an operand: lines of contiguous elements, which are its rows or, with kMN, the elements of one
// inner index.
template <device::Major kMajor_>
struct Matrix {
  static constexpr device::Major kMajor = kMajor_;
  const void* data;
  DType dtype;
  int stride;  // from line to line, in elements

  __device__ Matrix(const void* data_, DType dtype_, std::int64_t stride_)
      : data(data_), dtype(dtype_), stride(static_cast<int>(stride_)) {}
  __device__ std::int64_t line_bytes() const { return stride * bytes_of(dtype); }
  // Whether every line begins at a multiple of 16 bytes.
  __device__ bool is_aligned() const {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && line_bytes() % 16 == 0;
  }
  static constexpr bool is_one_piece() { return true; }
  __device__ const void* line(int i) const { return static_cast<const char*>(data) + i * line_bytes(); }
};
using RowMatrix = Matrix<device::Major::kK>;
using ColumnMatrix = Matrix<device::Major::kMN>;

// W [E, columns] in segments.
template <device::Major kMajor_>
struct ExpertMatrix {
  static constexpr device::Major kMajor = kMajor_;
  const ExpertRows& rows;
  DType dtype;
  int columns;

  __device__ ExpertMatrix(const ExpertRows& rows_, std::int64_t columns_)
      : rows(rows_), dtype(rows_.dtype), columns(static_cast<int>(columns_)) {}
  __device__ std::int64_t line_bytes() const { return columns * bytes_of(dtype); }
  __device__ bool is_aligned() const { return rows.aligned && line_bytes() % 16 == 0; }
  __device__ bool is_one_piece() const { return rows.count == 1; }
  __device__ const void* line(int row) const {
    std::int64_t expert = row;
    const void* data = rows.segment_of(expert);
    return static_cast<const char*>(data) + expert * line_bytes();
  }
};

struct Gelu {
  float value, slope;

  __device__ explicit Gelu(float z) {
    const float share = 0.5f * (1.0f + erff(z * 0.70710678f));
    value = z * share;
    slope = share + z * 0.39894228f * expf(-0.5f * z * z);
  }
};

}  // namespace mfx::router
