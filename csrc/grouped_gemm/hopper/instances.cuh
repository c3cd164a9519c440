// The product kernels for sm_90a. They stand beside those of grouped_gemm/cuda_instances.cuh.
#pragma once

#include "grouped_gemm/hopper/row_product_kernel.cuh"
#include "grouped_gemm/hopper/weight_grad_kernel.cuh"
#include "grouped_gemm/product_table.cuh"

#define MFX_HOPPER_PRODUCTS(X, type, Op)                                                                     \
  X(grouped_forward_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kForward, false>)                  \
  X(grouped_input_grad_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kInputGrad, false>)             \
  X(grouped_hidden_grad_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kHiddenGrad, false>)           \
  X(grouped_forward_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kForward, true>)        \
  X(grouped_input_grad_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kInputGrad, true>)   \
  X(grouped_hidden_grad_transposed_##type##_128x128_sm90a, HopperRowProduct<Op, Product::kHiddenGrad, true>) \
  X(grouped_weight_grad_##type##_128x128_sm90a, HopperWeightGrad<Op>)

#define MFX_HOPPER_INSTANCES(type, Op) MFX_PRODUCT_INSTANCES(MFX_HOPPER_PRODUCTS, type##_sm90a, type, Op)
