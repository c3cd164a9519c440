#include "grouped_gemm/cuda_instances.cuh"

namespace mfx::grouped {

MFX_GROUPED_PRODUCTS(MFX_GROUPED_KERNEL, bf16, Bf16Math)

Instances product_instances_bf16() {
  static const ProductInstance table[] = {MFX_GROUPED_PRODUCTS(MFX_GROUPED_ROW, bf16, Bf16Math)};
  return {table, sizeof(table) / sizeof(table[0])};
}

}  // namespace mfx::grouped
