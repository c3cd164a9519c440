// The table of compiled product kernels, and which of them serves a product.
#pragma once

#include <cstdint>

namespace mfx::grouped {

// See RowProductParams and WeightGradParams.
enum class Product : std::uint8_t { kForward, kInputGrad, kHiddenGrad, kWeightGrad };

struct ProductInstance {
  const char* name;
  const void* kernel;
  Product product;
  bool transposed;                      // memory holds the rows of the matrices' transposes
  int rows, columns, columns_per_warp;  // of its tiles
  bool aligned;                         // operands, and rows on the way out, lie at multiples of 16 bytes
  int arch;                             // the first it runs on, 10 times its compute capability
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

// The instance with tiles of this height, of the newest architecture that a device of this compute capability, times
// 10, has; null where there is none.
inline const ProductInstance* choose_instance(const Instances& table, Product product, bool transposed, int rows,
                                              bool aligned, int capability) {
  const ProductInstance* best = nullptr;
  for (const ProductInstance* i = table.first; i != table.first + table.count; ++i) {
    const bool serves = i->product == product && i->transposed == transposed && i->rows == rows &&
                        i->aligned == aligned && i->arch <= capability;
    if (serves && (best == nullptr || i->arch > best->arch)) best = i;
  }
  return best;
}

}  // namespace mfx::grouped
