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
  bool transposed;                     // memory holds the rows of the matrices' transposes
  int rows, columns, columns_per_dot;  // of its tiles, and of a partial sum over a row
  bool aligned;                        // operands, and rows on the way out, lie at multiples of 16 bytes
  int arch;                            // 10 times the compute capability it was written for: the first it runs on,
  bool exact;                          // or the only one
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
// Those that need CUTLASS and sm_90a; a build may lack both.
Instances product_instances_bf16_sm90a();
Instances product_instances_f16_sm90a();

// The height of sm_80's tiles for this many slots: the experts' mean number of rows decides, which the host knows.
inline int rows_of_tile(Product product, bool aligned, std::int64_t slots, std::int64_t experts) {
  const std::int64_t mean = slots / experts;
  if (product == Product::kWeightGrad) return aligned ? 128 : 64;  // features, not slots
  if (!aligned) return 64;
  if (product == Product::kForward && mean <= 16) return 16;
  return mean <= 64 ? 64 : 128;
}

// Whether a device of this compute capability, times 10, runs it.
inline bool runs_on(const ProductInstance& instance, int capability) {
  return instance.exact ? instance.arch == capability : instance.arch <= capability;
}

// The instance with tiles of this height that the device runs; null where there is none.
inline const ProductInstance* choose_instance(const Instances& table, Product product, bool transposed, int rows,
                                              bool aligned, int capability) {
  for (const ProductInstance* i = table.first; i != table.first + table.count; ++i) {
    if (i->product == product && i->transposed == transposed && i->rows == rows && i->aligned == aligned &&
        runs_on(*i, capability)) {
      return i;
    }
  }
  return nullptr;
}

}  // namespace mfx::grouped
