// Which kernel of grouped_gemm's tables serves a product, as C functions for test_product_instances.py.
#include "grouped_gemm/cuda_instances.hpp"

#include <vector>

#define MFX_EXPORT extern "C" __attribute__((visibility("default")))

using mfx::grouped::Product;

MFX_EXPORT int product_rows_of_tile(int product, int aligned, std::int64_t slots, std::int64_t experts) {
  return mfx::grouped::rows_of_tile(static_cast<Product>(product), aligned != 0, slots, experts);
}

// Index of the chosen row of a table [count] of (product, transposed, rows, aligned, arch), or -1.
MFX_EXPORT int product_choose(const int (*table)[6], int count, int product, int transposed, int rows, int aligned,
                              int capability) {
  std::vector<mfx::grouped::ProductInstance> instances(count);
  for (int i = 0; i < count; ++i) {
    instances[i].product = static_cast<Product>(table[i][0]);
    instances[i].transposed = table[i][1] != 0;
    instances[i].rows = table[i][2];
    instances[i].aligned = table[i][3] != 0;
    instances[i].arch = table[i][4];
    instances[i].exact = table[i][5] != 0;
  }
  const auto* chosen = mfx::grouped::choose_instance({instances.data(), count}, static_cast<Product>(product),
                                                     transposed != 0, rows, aligned != 0, capability);
  return chosen == nullptr ? -1 : static_cast<int>(chosen - instances.data());
}
