// MFX_PRODUCT_INSTANCES(PRODUCTS, suffix, type, Op) defines the product kernels of one operand type (tile/operand.cuh),
// and the table of them; one file each, so that they compile side by side. PRODUCTS(X, type, Op) lists them as
// X(name of the kernel, its class).
#pragma once

#include "grouped_gemm/cuda_instances.hpp"

#define MFX_PRODUCT_KERNEL(name, ...)                                                                              \
  using name##_product = __VA_ARGS__;                                                                              \
  extern "C" __global__ void __launch_bounds__(name##_product::kBlockThreads, name##_product::Shape::kBlocksPerSm) \
      name(const __grid_constant__ name##_product::Params params) {                                                \
    name##_product::run(params);                                                                                   \
  }

#define MFX_PRODUCT_ROW(name, ...) describe<__VA_ARGS__>(#name, name),

#define MFX_PRODUCT_INSTANCES(PRODUCTS, suffix, type, Op)                         \
  namespace mfx::grouped {                                                        \
  PRODUCTS(MFX_PRODUCT_KERNEL, type, Op)                                          \
  Instances product_instances_##suffix() {                                        \
    static const ProductInstance table[] = {PRODUCTS(MFX_PRODUCT_ROW, type, Op)}; \
    return {table, sizeof(table) / sizeof(table[0])};                             \
  }                                                                               \
  }

namespace mfx::grouped {

template <typename P, typename Kernel>
ProductInstance describe(const char* name, Kernel* kernel) {
  using Shape = typename P::Shape;
  return {name,
          reinterpret_cast<const void*>(kernel),
          P::kProduct,
          P::kTransposed,
          Shape::kRows,
          Shape::kColumns,
          P::kColumnsPerDot,
          P::kAligned,
          P::kArch,
          P::kExactArch,
          P::kBlockThreads,
          P::kSharedBytes,
          Shape::kBlocksPerSm};
}

}  // namespace mfx::grouped
