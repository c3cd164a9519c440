// How TMA is told where the experts' matrices lie.
#pragma once

#include "core/cuda_launch.hpp"
#include "grouped_gemm/hopper/params.cuh"

namespace mfx::grouped {

// Whether TMA can be told where matrices lie of which memory holds `rows` rows of `columns`, at multiples of 16 bytes.
// CUDA driver API, cuTensorMapEncodeTiled: a matrix takes a whole number of rows, and not fewer than it has.
inline bool has_maps(const ExpertMatrices& m, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;
  return rows > 0 && columns > 0 && m.count <= MatrixMaps::kMax && m.matrix_bytes >= rows * m.row_bytes &&
         m.matrix_bytes % m.row_bytes == 0 && m.matrix_bytes < kMostBytes;
}

// One map per segment of such matrices.
Status encode_matrices(const ExpertMatrices& matrices, std::int64_t rows, std::int64_t columns,
                       std::int64_t num_experts, DType dtype, MatrixMaps* maps);

}  // namespace mfx::grouped
