// The matrices of the gate network as operands of block_product.cuh: of any storage type, in segments,
// after an activation. An operand gives the value at (row, k), k being the inner index of the product, and says along
// which of the two its memory is contiguous.
#pragma once

#include <cstdint>

#include "core/dtype_of.hpp"
#include "moduleformer_ext/route_topk.hpp"
#include "ptx/convert.cuh"
#include "ptx/vector_memory.cuh"
#include "tile/segments.cuh"

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

// The rows of W, one per expert, or those of its gradient.
struct ExpertRows : device::Segments<32> {
  DType dtype;

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

// A matrix of which rows or columns (`along_k`: rows, the inner index) are contiguous, `stride` elements apart.
struct Matrix {
  const void* data;
  DType dtype;
  std::int64_t stride;
  bool along_k;

  __device__ float operator()(std::int64_t row, std::int64_t k) const {
    return load(data, dtype, along_k ? row * stride + k : k * stride + row);
  }
  // Where 16 aligned bytes of type Op can be read at once, else null.
  template <typename Op>
  __device__ const void* chunk(std::int64_t row, std::int64_t k) const {
    if (!along_k || dtype != kDTypeOf<Op>) return nullptr;
    const Op* address = static_cast<const Op*>(data) + row * stride + k;
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0 ? address : nullptr;
  }
};

// W [E, columns], or its transpose, in segments.
struct ExpertMatrix {
  const ExpertRows& rows;
  std::int64_t columns;
  bool along_k;

  __device__ float operator()(std::int64_t row, std::int64_t k) const {
    std::int64_t expert = along_k ? row : k;
    const std::int64_t column = along_k ? k : row;
    const void* data = rows.segment_of(expert);
    return load(data, rows.dtype, expert * columns + column);
  }
  template <typename Op>
  __device__ const void* chunk(std::int64_t row, std::int64_t k) const {
    const void* data = rows.segment_of(row);
    return Matrix{data, rows.dtype, columns, along_k}.chunk<Op>(row, k);
  }
};

__device__ inline float gelu(float z) {
  return 0.5f * z * (1.0f + erff(z * 0.70710678f));
}
__device__ inline float gelu_slope(float z) {
  return 0.5f * (1.0f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
}

// h = gelu(z) or z * scale of its token, of z [T, G], as rows (along_k) or as columns.
struct Activated {
  RouterGate gate;
  const float* z;
  const float* scales;  // [T], kGmm alone
  std::int64_t hidden_dim;
  bool along_k;

  __device__ float operator()(std::int64_t row, std::int64_t k) const {
    const std::int64_t token = along_k ? row : k, column = along_k ? k : row;
    const float value = z[token * hidden_dim + column];
    return gate == RouterGate::kGmm ? value * scales[token] : gelu(value);
  }
  template <typename Op>
  __device__ const void* chunk(std::int64_t, std::int64_t) const {
    return nullptr;
  }
};

}  // namespace mfx::router
