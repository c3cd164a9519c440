#pragma once

#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {

// Kernels follow these indices into memory, so a layout that is none must stop here. S comparisons: nothing beside
// the products.
inline Status check_layout(const RoutedLayout& layout) {
  const std::int64_t slots = layout.num_slots();
  const std::int32_t* const offsets = layout.offsets;
  for (std::int64_t e = 0; e <= layout.num_experts; ++e) {
    const bool fits = e == 0 ? offsets[e] == 0 : offsets[e] >= offsets[e - 1];
    if (!fits || (e == layout.num_experts && offsets[e] != slots)) {
      return {.message = "layout.offsets must ascend from 0 to the number of slots", .got = offsets[e], .index = e};
    }
  }
  for (std::int64_t p = 0; p < slots; ++p) {
    const std::int32_t slot = layout.slot_order[p];
    if (slot < 0 || slot >= slots || layout.position[slot] != p) {
      return {.message = "layout.slot_order must be a permutation of the slots and layout.position its inverse",
              .got = slot,
              .index = p};
    }
  }
  return {};
}

}  // namespace mfx
