// Defines the product kernels of one kind of arithmetic; one file each, so that they compile side by side.
#pragma once

#include "grouped_gemm/cuda_instances.hpp"
#include "grouped_gemm/row_product_kernel.cuh"
#include "grouped_gemm/weight_grad_kernel.cuh"

// X(name of the kernel, its class); `type` names the arithmetic. A row for another architecture goes here.
#define MFX_GROUPED_PRODUCTS(X, type, Math)                                                                        \
  X(grouped_forward_##type##_16x32_sm80, RowProduct<Math, SmallTile, Product::kForward, true>)                     \
  X(grouped_forward_##type##_64x128_sm80, RowProduct<Math, MediumTile, Product::kForward, true>)                   \
  X(grouped_forward_##type##_128x128_sm80, RowProduct<Math, LargeTile, Product::kForward, true>)                   \
  X(grouped_forward_##type##_64x128_unaligned_sm80, RowProduct<Math, MediumTile, Product::kForward, false>)        \
  X(grouped_input_grad_##type##_64x128_sm80, RowProduct<Math, MediumTile, Product::kInputGrad, true>)              \
  X(grouped_input_grad_##type##_128x128_sm80, RowProduct<Math, LargeTile, Product::kInputGrad, true>)              \
  X(grouped_input_grad_##type##_64x128_unaligned_sm80, RowProduct<Math, MediumTile, Product::kInputGrad, false>)   \
  X(grouped_hidden_grad_##type##_64x128_sm80, RowProduct<Math, MediumTile, Product::kHiddenGrad, true>)            \
  X(grouped_hidden_grad_##type##_128x128_sm80, RowProduct<Math, LargeTile, Product::kHiddenGrad, true>)            \
  X(grouped_hidden_grad_##type##_64x128_unaligned_sm80, RowProduct<Math, MediumTile, Product::kHiddenGrad, false>) \
  X(grouped_weight_grad_##type##_128x128_sm80, WeightGrad<Math, LargeTile, true>)                                  \
  X(grouped_weight_grad_##type##_64x128_unaligned_sm80, WeightGrad<Math, MediumTile, false>)

#define MFX_GROUPED_KERNEL(name, ...)                                                                                \
  using name##_product = __VA_ARGS__;                                                                                \
  extern "C" __global__ void __launch_bounds__(name##_product::Shape::kThreads, name##_product::Shape::kBlocksPerSm) \
      name(const __grid_constant__ name##_product::Params params) {                                                  \
    name##_product::run(params);                                                                                     \
  }

#define MFX_GROUPED_ROW(name, ...) describe<__VA_ARGS__>(#name, name),

namespace mfx::grouped {

template <typename P, typename Kernel>
ProductInstance describe(const char* name, Kernel* kernel) {
  using Shape = typename P::Shape;
  return {name,
          reinterpret_cast<const void*>(kernel),
          P::kProduct,
          Shape::kRows,
          Shape::kColumns,
          Shape::kColumnsPerWarp,
          P::kAligned,
          80,
          Shape::kThreads,
          P::kSharedBytes,
          Shape::kBlocksPerSm};
}

}  // namespace mfx::grouped
