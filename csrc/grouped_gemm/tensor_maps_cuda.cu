#include "grouped_gemm/tensor_maps.hpp"

#include <cstdint>
#include <string>

namespace mfx::grouped {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// By way of the runtime, so that nothing links the driver's library.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  call_runtime([&] {
#if CUDART_VERSION >= 12050
    return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    return cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  });
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

Status encode_matrices(const ExpertMatrices& matrices, std::int64_t rows, std::int64_t columns,
                       std::int64_t num_experts, DType dtype, MatrixMaps* maps) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return {"the driver has no cuTensorMapEncodeTiled"};
  const CUtensorMapDataType type =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  for (int s = 0; s < matrices.count; ++s) {
    const std::int64_t end = s + 1 < matrices.count ? matrices.first[s + 1] : num_experts;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(end - matrices.first[s])};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrices.row_bytes),
                                  static_cast<cuuint64_t>(matrices.matrix_bytes)};
    const cuuint32_t box[] = {64, 64, 1}, steps[] = {1, 1, 1};
    const CUresult error =
        encode(&maps->map[s], type, 3, matrices.data[s], sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) {
      return failure("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(error)));
    }
  }
  return {};
}

}  // namespace mfx::grouped
