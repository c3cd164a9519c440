#include "moduleformer_ext/linear_decode.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "linear_decode";

struct Args {
  at::Tensor x, weight;
  OptionalTensor bias;
};

void check_arguments(const Args& a) {
  const auto& [x, weight, bias] = a;
  MFX_CHECK_ARG(x.dim() >= 1, kOp, "x", "be [..., in]", "shape ", x.sym_sizes());
  check_float_dtype(kOp, "x", x);
  check_projection(kOp, "weight", weight, "out", "in", x);
  MFX_CHECK_ARG(weight.is_contiguous(), kOp, "weight", "be contiguous", "strides ", weight.sym_strides());
  if (!bias) return;
  check_dim(kOp, "bias", *bias, 1);
  check_same_dtype(kOp, "bias", *bias, "x", x);
  check_same_device(kOp, "bias", *bias, "x", x);
  MFX_CHECK_ARG(bias->sym_size(0) == weight.sym_size(0), kOp, "bias",
                c10::str("be [out] with out = ", weight.sym_size(0)), "shape ", bias->sym_sizes());
}

at::Tensor allocate(const at::Tensor& x, const at::Tensor& weight) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

template <bool kMeta>
at::Tensor linear_decode(const Args& a) {
  const auto& [x, weight, bias] = a;
  check_arguments(a);
  if constexpr (kMeta) return allocate(x, weight);
  check_cpu(kOp, "x", x);
  const at::Tensor rows = x.contiguous(), addend = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = allocate(x, weight);
  const LinearDecodeParams params = {
      .dtype = check_float_dtype(kOp, "x", x),
      .x = rows.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = addend.defined() ? addend.const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .num_rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)),
      .in = weight.size(1),
      .out = weight.size(0),
  };
  check_status(kOp, linear_decode_cpu(params));
  return y;
}

at::Tensor autograd(const Args& a) {
  constexpr const char* kInstead = "torch.nn.functional.linear";
  refuse_gradient(kOp, "x", a.x, kInstead);
  refuse_gradient(kOp, "weight", a.weight, kInstead);
  refuse_gradient(kOp, "bias", a.bias, kInstead);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<"linear_decode", &autograd>(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  Definition(m, "linear_decode(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
      .kernel<&linear_decode<false>>({CPU})
      .kernel<&linear_decode<true>>({Meta})
      .kernel<&autograd>({Autograd});
}

}  // namespace mfx
