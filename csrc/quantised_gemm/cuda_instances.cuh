// The kernels for sm_80 and later. A warp has 64 columns, as a panel has.
#pragma once

#include "grouped_gemm/product_table.cuh"
#include "quantised_gemm/cuda_instances.hpp"
#include "quantised_gemm/product_kernel.cuh"

#define MFX_QUANTISED_PRODUCTS(X, name, Op, kBits)                                    \
  X(quantised_##name##_16x64_sm80, quantised::Product<Op, SmallPanel, kBits, true>)   \
  X(quantised_##name##_64x128_sm80, quantised::Product<Op, MediumPanel, kBits, true>) \
  X(quantised_##name##_128x128_sm80, quantised::Product<Op, LargePanel, kBits, true>) \
  X(quantised_##name##_64x128_unaligned_sm80, quantised::Product<Op, MediumPanel, kBits, false>)
#define MFX_QUANTISED_8(X, type, Op) MFX_QUANTISED_PRODUCTS(X, 8_##type, Op, 8)
#define MFX_QUANTISED_4(X, type, Op) MFX_QUANTISED_PRODUCTS(X, 4_##type, Op, 4)

#define MFX_QUANTISED_INSTANCES(type, Op)                              \
  MFX_PRODUCT_INSTANCES(MFX_QUANTISED_8, quantised_8_##type, type, Op) \
  MFX_PRODUCT_INSTANCES(MFX_QUANTISED_4, quantised_4_##type, type, Op)

namespace mfx::grouped {

// Few rows per expert: warps share the depth, and six slices are under way, as there may be fewer blocks than
// multiprocessors.
using SmallPanel = device::BlockShape<16, 64, 1, 1, 4, 256, 6, 3>;
// 32 rows per warp: with 4 bits there are two sums of each element, a group's and those before it.
using MediumPanel = device::BlockShape<64, 128, 2, 2, 1, 128, 4, 2>;
using LargePanel = device::BlockShape<128, 128, 4, 2, 1, 128, 4, 1>;

}  // namespace mfx::grouped
