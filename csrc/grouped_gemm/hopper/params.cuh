// What the sm_90a kernels are told: what those of sm_80 are, and how TMA finds the matrices.
#pragma once

#include <cuda.h>

#include "grouped_gemm/kernel_params.cuh"

namespace mfx::grouped {

// One map per segment of ExpertMatrices: {columns, rows, experts}, read in boxes of 64 x 64. A launch of more segments
// is left to sm_80's kernels.
struct MatrixMaps {
  static constexpr int kMax = 8;
  CUtensorMap map[kMax];
};

struct HopperRowProductParams {
  RowProductParams product;
  MatrixMaps matrices;
};

}  // namespace mfx::grouped
