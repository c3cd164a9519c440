// Quantised matrices of experts at the border to torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "core/divide.hpp"
#include "moduleformer_ext/quantised_gemm.hpp"

namespace mfx {

// The arguments that stand for Python's QuantisedMatrices in a schema.
struct QuantisedWeight {
  at::Tensor values, scales;
  int64_t bits, in_features, out_features;

  QuantisedMatrices view() const {
    return {values.const_data_ptr<int8_t>(), scales.const_data_ptr(), static_cast<int>(bits)};
  }

  // The shapes that QuantisedMatrices describes, for so many experts and beside x.
  void check(const char* op, const std::string& argument, const c10::SymInt& experts, const at::Tensor& x) const {
    MFX_CHECK_ARG(check_float_dtype(op, "x", x) != DType::kFloat64, op, "x", "be float32, bfloat16 or float16",
                  x.scalar_type());
    MFX_CHECK_ARG(bits == 8 || bits == 4, op, argument + ".bits", "be 8 or 4", bits);
    const auto check_features = [&](const char* name, int64_t features) {
      constexpr int64_t kMost = int64_t{1} << 40;  // more than memory, and what is computed below does not overflow
      MFX_CHECK_ARG(features >= 1 && features <= kMost, op, argument + name, c10::str("be in [1, ", kMost, "]"),
                    features);
    };
    check_features(".in_features", in_features);
    check_features(".out_features", out_features);
    const int64_t panels = ceil_div(out_features, kQuantisedPanel);
    const int64_t groups = bits == 8 ? 1 : ceil_div(in_features, kQuantisedGroup);
    const int64_t rows = bits == 8 ? in_features : groups * (kQuantisedGroup / 2);
    const auto check_part = [&](const std::string& name, const at::Tensor& part, at::SymIntArrayRef shape,
                                at::ScalarType dtype) {
      check_tensor(op, name.c_str(), part, shape, dtype, "x", x);
      MFX_CHECK_ARG(part.is_contiguous(), op, name, "be contiguous", "strides ", part.sym_strides());
    };
    check_part(argument + ".values", values, {experts, panels, rows, kQuantisedPanel}, at::kChar);
    check_part(argument + ".scales", scales, {experts, panels, groups, kQuantisedPanel},
               bits == 8 ? at::kFloat : at::kHalf);
  }

  // What the CUDA kernels ask for beyond that.
  void check_runnable(const char* op, const std::string& argument, const at::Tensor& x) const {
    if (backend_of(op, "x", x) == Backend::kCpu) return;
    MFX_CHECK_ARG(x.scalar_type() != at::kFloat, op, "x", "be bfloat16 or float16 beside quantised matrices on CUDA",
                  x.scalar_type());
    const auto check_address = [&](const char* name, const at::Tensor& part) {
      const auto beyond = reinterpret_cast<std::uintptr_t>(part.const_data_ptr()) % 16;
      MFX_CHECK_ARG(beyond == 0, op, argument + name, "begin at a multiple of 16 bytes on CUDA", beyond,
                    " bytes beyond one");
    };
    check_address(".values", values);
    check_address(".scales", scales);
  }

  void check_gated(const char* op, const std::string& argument) const {
    constexpr int64_t kPair = 2 * kQuantisedPanel;
    MFX_CHECK_ARG(out_features % kPair == 0, op, argument + ".out_features",
                  c10::str("be a multiple of ", kPair, " for a gated activation"), out_features);
  }
};

}  // namespace mfx
