// The product kernels for sm_80 and later. Hopper's own are in hopper/instances.cuh.
#pragma once

#include "grouped_gemm/product_table.cuh"
#include "grouped_gemm/row_product_kernel.cuh"
#include "grouped_gemm/weight_grad_kernel.cuh"

#define MFX_GROUPED_TILES(X, name, Op, product, transposed)                              \
  X(grouped_##name##_64x128_sm80, RowProduct<Op, MediumTile, product, transposed, true>) \
  X(grouped_##name##_128x128_sm80, RowProduct<Op, LargeTile, product, transposed, true>) \
  X(grouped_##name##_64x128_unaligned_sm80, RowProduct<Op, MediumTile, product, transposed, false>)

#define MFX_GROUPED_PRODUCTS(X, type, Op)                                                                     \
  X(grouped_forward_##type##_16x32_sm80, RowProduct<Op, SmallTile, Product::kForward, false, true>)           \
  MFX_GROUPED_TILES(X, forward_##type, Op, Product::kForward, false)                                          \
  MFX_GROUPED_TILES(X, input_grad_##type, Op, Product::kInputGrad, false)                                     \
  MFX_GROUPED_TILES(X, hidden_grad_##type, Op, Product::kHiddenGrad, false)                                   \
  X(grouped_forward_transposed_##type##_16x32_sm80, RowProduct<Op, SmallTile, Product::kForward, true, true>) \
  MFX_GROUPED_TILES(X, forward_transposed_##type, Op, Product::kForward, true)                                \
  MFX_GROUPED_TILES(X, input_grad_transposed_##type, Op, Product::kInputGrad, true)                           \
  MFX_GROUPED_TILES(X, hidden_grad_transposed_##type, Op, Product::kHiddenGrad, true)                         \
  X(grouped_weight_grad_##type##_128x128_sm80, WeightGrad<Op, LargeTile, true>)                               \
  X(grouped_weight_grad_##type##_64x128_unaligned_sm80, WeightGrad<Op, MediumTile, false>)

#define MFX_GROUPED_INSTANCES(type, Op) MFX_PRODUCT_INSTANCES(MFX_GROUPED_PRODUCTS, type, type, Op)

namespace mfx::grouped {

using LargeTile = device::BlockShape<128, 128, 2, 2, 1, 64, 4, 2>;
using MediumTile = device::BlockShape<64, 128, 1, 4, 1, 128, 3, 2>;
// Few rows per expert: the matrix streams through, and its depth is all there is to divide between the warps.
using SmallTile = device::BlockShape<16, 32, 1, 1, 4, 256, 4, 4>;

}  // namespace mfx::grouped
