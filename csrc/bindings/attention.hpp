// What the bindings of stick_attention and stick_attention_decode share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>

namespace mfx {

// Kernels take any strides over a contiguous head dimension.
inline at::Tensor with_contiguous_heads(const at::Tensor& tensor) {
  return tensor.sym_stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Without gaps, and with the strides in the order of `tensor`'s, but the head dimension innermost: empty_like alone
// puts another one there where several of an overlapping tensor have stride 1.
inline at::Tensor empty_in_order_of(const at::Tensor& tensor) {
  at::Tensor result = at::empty_like(tensor);
  return result.sym_stride(-1) == 1 ? result : at::empty_symint(tensor.sym_sizes(), tensor.options());
}

// Whether v holds the elements of k at the same addresses, so that kernels need to read one of them only. Both have one
// shape; the stride of a dimension of size 1 or 0 leads nowhere.
inline bool is_same_memory(const at::Tensor& k, const at::Tensor& v) {
  if (k.const_data_ptr() != v.const_data_ptr()) return false;
  for (int64_t i = 0; i < k.dim(); ++i) {
    if (k.size(i) > 1 && k.stride(i) != v.stride(i)) return false;
  }
  return true;
}

inline double stick_epsilon_or_default(std::optional<double> epsilon, const at::Tensor& q) {
  return epsilon.value_or(q.scalar_type() == at::kDouble ? 0.0 : 0x1p-24);
}

}  // namespace mfx
