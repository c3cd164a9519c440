// What the bindings of stick_attention and stick_attention_decode share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <optional>

#include "bindings/checks.hpp"
#include "moduleformer_ext/stick_attention.hpp"

namespace mfx {

// Whether q is [.., H_kv, G, D] and not [.., H_q, D], with or without a batch dimension.
inline bool is_grouped(const at::Tensor& q, bool packed = false) {
  return q.dim() == (packed ? 4 : 5);
}

inline void check_head_dim(const char* op, const char* argument, const at::Tensor& heads) {
  const auto dim = heads.sym_size(-1);
  MFX_CHECK_ARG(dim >= 8 && dim <= 1024 && dim % 8 == 0, op, argument,
                "have a head dim that is a multiple of 8 in [8, 1024]", dim);
}

// The heads of q beside those of keys.
inline void check_heads(const char* op, const at::Tensor& q, bool grouped, const char* keys_name,
                        const at::Tensor& keys) {
  const auto heads = keys.sym_size(-2);
  MFX_CHECK_ARG(heads >= 1, op, keys_name, "have at least one head", "shape ", keys.sym_sizes());
  if (grouped) {
    MFX_CHECK_ARG(q.sym_size(-3) == heads, op, "q", c10::str("have ", keys_name, "'s ", heads, " heads"),
                  q.sym_size(-3));
  } else {
    MFX_CHECK_ARG(q.sym_size(-2) % heads == 0, op, "q",
                  c10::str("have a multiple of ", keys_name, "'s ", heads, " heads"), q.sym_size(-2));
  }
}

// A mask of keys [B, tokens, H_kv, D].
inline void check_key_padding_mask(const char* op, const at::Tensor& mask, const at::Tensor& keys,
                                   const char* tokens_name) {
  check_dim(op, "key_padding_mask", mask, 2);
  MFX_CHECK_ARG(mask.scalar_type() == at::kBool, op, "key_padding_mask", "be bool", mask.scalar_type());
  MFX_CHECK_ARG(mask.sym_size(0) == keys.sym_size(0) && mask.sym_size(1) == keys.sym_size(1), op, "key_padding_mask",
                c10::str("be [B, ", tokens_name, "] = [", keys.sym_size(0), ", ", keys.sym_size(1), "]"), "shape ",
                mask.sym_sizes());
  check_same_device(op, "key_padding_mask", mask, "q", keys);
}

inline double scale_or_default(std::optional<double> scale, const at::Tensor& q) {
  return scale.value_or(std::pow(static_cast<double>(q.size(-1)), -0.5));
}

// A whole stick, of length 1, is never short enough to stop at.
inline void check_stick_epsilon(const char* op, std::optional<double> epsilon) {
  MFX_CHECK_ARG(!epsilon || (*epsilon >= 0 && *epsilon < 1), op, "stick_epsilon", "lie in [0, 1)", *epsilon);
}
inline double stick_epsilon_or_default(std::optional<double> epsilon, const at::Tensor& q) {
  return epsilon.value_or(q.scalar_type() == at::kDouble ? 0.0 : 0x1p-24);
}

// Of q or a tensor of its shape, `group` query heads per K/V head.
inline StickQueryStrides query_strides(const at::Tensor& q, int64_t group, bool packed = false) {
  const int64_t batch = packed ? 0 : q.stride(0), token = q.stride(packed ? 0 : 1);
  if (is_grouped(q, packed)) return {batch, token, q.stride(-3), q.stride(-2)};
  return {batch, token, q.stride(-2) * group, q.stride(-2)};
}
inline StickKeyStrides key_strides(const at::Tensor& k, bool packed = false) {
  return {packed ? 0 : k.stride(0), k.stride(packed ? 0 : 1), k.stride(-2)};
}

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

}  // namespace mfx
