#include "moduleformer_ext/quantised_gemm.hpp"

#include <ATen/core/LegacyTypeDispatch.h>

#include <optional>
#include <string>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/quantised.hpp"
#include "bindings/routed.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "quantised_gemm";

struct Args {
  at::Tensor x;
  QuantisedWeight weight;
  LayoutTensors layout;
  std::string x_order, out_order;
  OptionalTensor gates;
  std::optional<std::string> activation;
};

ActivationSpec activation(const Args& a) {
  return a.activation ? parse_activation(kOp, *a.activation) : ActivationSpec{};
}

void check_arguments(const Args& a) {
  const RowOrder x_order = parse_order(kOp, "x_order", a.x_order),
                 out_order = parse_order(kOp, "out_order", a.out_order);
  check_layout(kOp, a.layout, a.x);
  check_rows(kOp, "x", a.x, a.layout, x_order);
  a.weight.check(kOp, "weight", a.layout.num_experts(), a.x);
  MFX_CHECK_ARG(a.x.sym_size(-1) == a.weight.in_features, kOp, "x",
                c10::str("have as many features as weight has rows (", a.weight.in_features, ")"), a.x.sym_size(-1));
  if (activation(a).gated) a.weight.check_gated(kOp, "weight");
  if (!a.gates) return;
  check_gates(kOp, *a.gates, a.layout, a.x);
  MFX_CHECK_ARG(out_order == RowOrder::kToken, kOp, "out_order", "be 'token' where gates are given", "'", a.out_order,
                "'");
}

template <bool kMeta>
at::Tensor quantised_gemm(const Args& a) {
  check_arguments(a);
  const RowOrder out_order = parse_order(kOp, "out_order", a.out_order);
  const int64_t columns = activation(a).gated ? a.weight.out_features / 2 : a.weight.out_features;
  const at::Tensor out = empty_rows(rows_shape(a.layout, out_order, columns), a.x.options());
  if constexpr (kMeta) return out;
  a.weight.check_runnable(kOp, "weight", a.x);
  const at::Tensor x = with_unit_stride(a.x), gates = contiguous(a.gates);
  const QuantisedGemmParams params = {
      .dtype = check_float_dtype(kOp, "x", x),
      .layout = a.layout.view(),
      .activation = activation(a),
      .in_features = a.weight.in_features,
      .out_features = a.weight.out_features,
      .x = view_rows(x, parse_order(kOp, "x_order", a.x_order)),
      .weight = a.weight.view(),
      .gates = const_data_or_null(gates),
      .out_order = out_order,
      .out = out.mutable_data_ptr(),
  };
  launch(kOp, backend_of(kOp, "x", x), {x, a.weight.values}, params, quantised_gemm_cpu,
         MFX_CUDA_FUNCTION(mfx_quantised_gemm_cuda), MFX_CUDA_FUNCTION(mfx_quantised_gemm_cuda_workspace));
  return out;
}

at::Tensor inference(const Args& a) {
  const RefuseGradient refuse{kOp, "grouped_gemm with dequantised matrices"};
  refuse("x", a.x);
  refuse("weight.scales", a.weight.scales);
  refuse("gates", a.gates);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<"quantised_gemm", &inference>(a);
}

// x in the autocast type; gates stay float32, as the router made them.
at::Tensor autocast(Args a) {
  const Autocast cast(a.x);
  cast(a.x);
  return call<"quantised_gemm", &autocast>(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  Definition(
      m,
      "quantised_gemm(Tensor x, Tensor values, Tensor scales, int bits, int in_features, int out_features, "
      "Tensor offsets, Tensor slot_order, Tensor position, int num_choices, str x_order, str out_order, Tensor? gates, "
      "str? activation) -> Tensor")
      .kernel<&quantised_gemm<false>>({CPU, CUDA})
      .kernel<&quantised_gemm<true>>({Meta})
      .kernel<&inference>({Autograd})
      .kernel<&autocast>({AutocastCPU, AutocastCUDA});
}

}  // namespace mfx
