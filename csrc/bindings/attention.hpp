// What the bindings of stick_attention and stick_attention_decode share.
#pragma once

#include <ATen/core/Tensor.h>

namespace mfx {

// Whether v holds the elements of k at the same addresses, so that kernels need to read one of them only. Both have one
// shape; the stride of a dimension of size 1 or 0 leads nowhere.
inline bool is_same_memory(const at::Tensor& k, const at::Tensor& v) {
  if (k.const_data_ptr() != v.const_data_ptr()) return false;
  for (int64_t i = 0; i < k.dim(); ++i) {
    if (k.size(i) > 1 && k.stride(i) != v.stride(i)) return false;
  }
  return true;
}

}  // namespace mfx
