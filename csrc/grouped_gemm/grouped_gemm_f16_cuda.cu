#include "grouped_gemm/cuda_instances.cuh"

namespace mfx::grouped {

MFX_GROUPED_PRODUCTS(MFX_GROUPED_KERNEL, f16, F16Math)

Instances product_instances_f16() {
  static const ProductInstance table[] = {MFX_GROUPED_PRODUCTS(MFX_GROUPED_ROW, f16, F16Math)};
  return {table, sizeof(table) / sizeof(table[0])};
}

}  // namespace mfx::grouped
