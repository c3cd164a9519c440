#include "moduleformer_ext/quantised_gemm.hpp"

#include <ATen/core/LegacyTypeDispatch.h>

#include <optional>
#include <string>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"
#include "core/divide.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "quantised_gemm";

// The arguments that stand for QuantisedMatrices in the schema.
struct Weight {
  at::Tensor values, scales;
  int64_t bits, in_features, out_features;
};

struct Args {
  at::Tensor x;
  Weight weight;
  LayoutTensors layout;
  std::string x_order, out_order;
  OptionalTensor gates;
  std::optional<std::string> activation;
};

ActivationSpec activation(const Args& a) {
  return a.activation ? parse_activation(kOp, *a.activation) : ActivationSpec{};
}

// The shapes that QuantisedMatrices describes.
void check_weight(const Args& a) {
  const auto& [values, scales, bits, in_features, out_features] = a.weight;
  MFX_CHECK_ARG(bits == 8 || bits == 4, kOp, "weight.bits", "be 8 or 4", bits);
  MFX_CHECK_ARG(in_features >= 1, kOp, "weight.in_features", "be at least 1", in_features);
  MFX_CHECK_ARG(out_features >= 1, kOp, "weight.out_features", "be at least 1", out_features);
  MFX_CHECK_ARG(a.x.sym_size(-1) == in_features, kOp, "x",
                c10::str("have as many features as weight has rows (", in_features, ")"), a.x.sym_size(-1));
  const c10::SymInt experts = a.layout.num_experts();
  const int64_t panels = ceil_div(out_features, kQuantisedPanel);
  const int64_t groups = bits == 8 ? 1 : ceil_div(in_features, kQuantisedGroup);
  const int64_t rows = bits == 8 ? in_features : groups * (kQuantisedGroup / 2);
  check_tensor(kOp, "weight.values", values, {experts, panels, rows, kQuantisedPanel}, at::kChar, "x", a.x);
  check_tensor(kOp, "weight.scales", scales, {experts, panels, groups, kQuantisedPanel},
               bits == 8 ? at::kFloat : at::kHalf, "x", a.x);
  for (const auto& [name, tensor] : {std::pair("weight.values", values), {"weight.scales", scales}}) {
    MFX_CHECK_ARG(tensor.is_contiguous(), kOp, name, "be contiguous", "strides ", tensor.sym_strides());
  }
}

void check_arguments(const Args& a) {
  const RowOrder x_order = parse_order(kOp, "x_order", a.x_order),
                 out_order = parse_order(kOp, "out_order", a.out_order);
  MFX_CHECK_ARG(check_float_dtype(kOp, "x", a.x) != DType::kFloat64, kOp, "x", "be float32, bfloat16 or float16",
                a.x.scalar_type());
  check_layout(kOp, a.layout, a.x);
  check_rows(kOp, "x", a.x, a.layout, x_order);
  check_weight(a);
  constexpr int64_t kPair = 2 * kQuantisedPanel;
  MFX_CHECK_ARG(!activation(a).gated || a.weight.out_features % kPair == 0, kOp, "weight.out_features",
                c10::str("be a multiple of ", kPair, " for a gated activation"), a.weight.out_features);
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
  check_cpu(kOp, "x", a.x);
  const at::Tensor x = with_unit_stride(a.x), gates = contiguous(a.gates);
  const QuantisedGemmParams params = {
      .dtype = check_float_dtype(kOp, "x", x),
      .layout = a.layout.view(),
      .activation = activation(a),
      .in_features = a.weight.in_features,
      .out_features = a.weight.out_features,
      .x = view_rows(x, parse_order(kOp, "x_order", a.x_order)),
      .weight = {a.weight.values.const_data_ptr<int8_t>(), a.weight.scales.const_data_ptr(),
                 static_cast<int>(a.weight.bits)},
      .gates = const_data_or_null(gates),
      .out_order = out_order,
      .out = out.mutable_data_ptr(),
  };
  check_status(kOp, quantised_gemm_cpu(params));
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
      .kernel<&quantised_gemm<false>>({CPU})
      .kernel<&quantised_gemm<true>>({Meta})
      .kernel<&inference>({Autograd})
      .kernel<&autocast>({AutocastCPU});
}

}  // namespace mfx
