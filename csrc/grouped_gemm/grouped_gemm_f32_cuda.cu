#include "grouped_gemm/cuda_instances.cuh"

namespace mfx::grouped {

MFX_GROUPED_PRODUCTS(MFX_GROUPED_KERNEL, f32, F32Math)

Instances product_instances_f32() {
  static const ProductInstance table[] = {MFX_GROUPED_PRODUCTS(MFX_GROUPED_ROW, f32, F32Math)};
  return {table, sizeof(table) / sizeof(table[0])};
}

}  // namespace mfx::grouped
