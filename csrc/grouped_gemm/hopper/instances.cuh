// MFX_HOPPER_INSTANCES(type, Op) defines the sm_90a product kernels of one operand type, and the table of them; one
// file each. They stand beside those of grouped_gemm/cuda_instances.cuh.
#pragma once

#include "grouped_gemm/hopper/row_product_kernel.cuh"
#include "grouped_gemm/hopper/weight_grad_kernel.cuh"

// X(name of the kernel, its class)
#define MFX_HOPPER_PRODUCTS(X, type, Op)                                                                     \
  X(grouped_forward_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kForward, false>)                  \
  X(grouped_input_grad_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kInputGrad, false>)             \
  X(grouped_hidden_grad_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kHiddenGrad, false>)           \
  X(grouped_forward_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kForward, true>)        \
  X(grouped_input_grad_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kInputGrad, true>)   \
  X(grouped_hidden_grad_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kHiddenGrad, true>) \
  X(grouped_weight_grad_##type##_128x128_sm90a, HopperWeightGrad<Op>)

#define MFX_HOPPER_KERNEL(name, ...)                                                     \
  using name##_product = __VA_ARGS__;                                                    \
  extern "C" __global__ void __launch_bounds__(device::WarpgroupShape::kBlockThreads, 1) \
      name(const __grid_constant__ name##_product::Params params) {                      \
    name##_product::run(params);                                                         \
  }

#define MFX_HOPPER_ROW(name, ...) describe_hopper<__VA_ARGS__>(#name, name),

#define MFX_HOPPER_INSTANCES(type, Op)                                                      \
  namespace mfx::grouped {                                                                  \
  MFX_HOPPER_PRODUCTS(MFX_HOPPER_KERNEL, type, Op)                                          \
  Instances product_instances_##type##_sm90a() {                                            \
    static const ProductInstance table[] = {MFX_HOPPER_PRODUCTS(MFX_HOPPER_ROW, type, Op)}; \
    return {table, sizeof(table) / sizeof(table[0])};                                       \
  }                                                                                         \
  }

namespace mfx::grouped {

template <typename P, typename Kernel>
ProductInstance describe_hopper(const char* name, Kernel* kernel) {
  using Shape = device::WarpgroupShape;
  return {name,
          reinterpret_cast<const void*>(kernel),
          P::kProduct,
          P::kTransposed,
          Shape::kRows,
          Shape::kColumns,
          WarpgroupEpilogue::kColumnsPerPart,
          true,
          90,
          true,
          Shape::kBlockThreads,
          P::kSharedBytes,
          Shape::kBlocksPerSm};
}

}  // namespace mfx::grouped
