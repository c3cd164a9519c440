#include "bindings/linear_decode.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "moduleformer_ext/linear_decode.hpp"

namespace mfx {

void check_linear(const char* op, const at::Tensor& x, const char* weight_name, const at::Tensor& weight,
                  const char* bias_name, const OptionalTensor& bias) {
  check_projection(op, weight_name, weight, "out", "in", x);
  MFX_CHECK_ARG(weight.is_contiguous(), op, weight_name, "be contiguous", "strides ", weight.sym_strides());
  if (!bias) return;
  check_dim(op, bias_name, *bias, 1);
  check_same_dtype(op, bias_name, *bias, "x", x);
  check_same_device(op, bias_name, *bias, "x", x);
  MFX_CHECK_ARG(bias->sym_size(0) == weight.sym_size(0), op, bias_name,
                c10::str("be [out] with out = ", weight.sym_size(0)), "shape ", bias->sym_sizes());
}

static at::Tensor allocate(const at::Tensor& x, const at::Tensor& weight) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

at::Tensor linear_of_few(const char* op, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const at::Tensor rows = x.contiguous(), addend = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = allocate(x, weight);
  const LinearDecodeParams params = {
      .dtype = check_float_dtype(op, "x", x),
      .x = rows.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = addend.defined() ? addend.const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .num_rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)),
      .in = weight.size(1),
      .out = weight.size(0),
  };
  check_status(op, linear_decode_cpu(params));
  return y;
}

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
  check_linear(kOp, x, "weight", weight, "bias", bias);
}

template <bool kMeta>
at::Tensor linear_decode(const Args& a) {
  const auto& [x, weight, bias] = a;
  check_arguments(a);
  if constexpr (kMeta) return allocate(x, weight);
  check_cpu(kOp, "x", x);
  return linear_of_few(kOp, x, weight, bias);
}

at::Tensor autograd(const Args& a) {
  const RefuseGradient refuse{kOp, "torch.nn.functional.linear"};
  refuse("x", a.x);
  refuse("weight", a.weight);
  refuse("bias", a.bias);
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
