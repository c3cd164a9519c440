#include "grouped_gemm/cuda_instances.cuh"

namespace mfx::grouped {

MFX_GROUPED_PRODUCTS(MFX_GROUPED_KERNEL, tf32, Tf32Math)

Instances product_instances_tf32() {
  static const ProductInstance table[] = {MFX_GROUPED_PRODUCTS(MFX_GROUPED_ROW, tf32, Tf32Math)};
  return {table, sizeof(table) / sizeof(table[0])};
}

}  // namespace mfx::grouped
