// quantised_gemm: grouped_gemm with matrices of 8- or 4-bit integers and their scales, for inference.
#pragma once

#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {

inline constexpr std::int64_t kQuantisedPanel = 64;  // columns that lie together
inline constexpr std::int64_t kQuantisedGroup = 32;  // rows that share a scale, with 4 bits

// W_e[l, n] = scale * number, [in, out]. Memory holds panels of 64 columns, with scales of 0 beyond `out`; in a
// panel the numbers of a row follow one another, and then the rows, so that a product reads it from end to end.
//
//   8 bits   values [E, panels, in, 64] int8; scales [E, panels, 1, 64] float32, one for each column
//   4 bits   values [E, panels, groups * 16, 64]: a byte is 16 n1 + n0 + 8, of the numbers n0 of row 2i and n1 of row
//            2i + 1, which are 0 beyond `in`; scales [E, panels, groups, 64] float16, one for 32 rows
struct QuantisedMatrices {
  const std::int8_t* values;
  const void* scales;
  int bits;
};

struct QuantisedGemmParams {
  DType dtype;  // of x and out; not float64
  RoutedLayout layout;
  ActivationSpec activation;  // gated: out_features is a multiple of two panels
  std::int64_t in_features, out_features;
  RoutedRows x;
  QuantisedMatrices weight;
  const void* gates;  // [T, K] float32, or null
  RowOrder out_order;
  void* out;                  // as in GroupedGemmParams
  void* workspace = nullptr;  // CUDA only: as much memory as mfx_quantised_gemm_cuda_workspace says
};

// Checks dtype, bits and, as grouped_gemm_cpu does, the contents of the layout.
Status quantised_gemm_cpu(const QuantisedGemmParams& params);

// bfloat16 and float16, on sm_80 and later, of values and scales that begin at multiples of 16 bytes. The layout stays
// on the device and is trusted.
extern "C" {
Status mfx_quantised_gemm_cuda(const QuantisedGemmParams& params, Stream stream);
// Bytes of `workspace`.
std::int64_t mfx_quantised_gemm_cuda_workspace(const QuantisedGemmParams& params);
}

}  // namespace mfx
