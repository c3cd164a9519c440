// The table of compiled product kernels, and which of them serves a product.
#pragma once

#include <cstdint>

#include "grouped_gemm/kernel_params.cuh"

namespace mfx::grouped {

struct ProductInstance {
  const char* name;
  const void* kernel;
  Product product;
  int rows, columns, columns_per_warp;  // of its tiles
  bool aligned;                         // operands, and rows on the way out, lie at multiples of 16 bytes
  int arch;                             // the first it runs on
  int threads, shared_bytes, blocks_per_sm;
};

struct Instances {
  const ProductInstance* first;
  int count;
};

Instances product_instances_bf16();
Instances product_instances_f16();
Instances product_instances_f32();   // float32 as three TF32 products
Instances product_instances_tf32();  // float32 rounded to TF32

// The height of the tiles for this many slots: the experts' mean number of rows decides, which the host knows.
inline int rows_of_tile(Product product, bool aligned, std::int64_t slots, std::int64_t experts) {
  const std::int64_t mean = slots / experts;
  if (product == Product::kWeightGrad) return aligned ? 128 : 64;  // features, not slots
  if (!aligned) return 64;
  if (product == Product::kForward && mean <= 16) return 16;
  return mean <= 64 ? 64 : 128;
}

}  // namespace mfx::grouped
