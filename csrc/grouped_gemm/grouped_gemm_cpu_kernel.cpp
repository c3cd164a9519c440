// Forward: every task multiplies rows of one expert by a block of columns of its matrix; bias, activation and the way
// out happen per 64 x 64 block. Where all experts have few rows, as in decoding, the matrices are streamed.
#include "grouped_gemm/epilogue.hpp"
#include "grouped_gemm/few_rows.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {
namespace {

template <typename T, typename Op>
void project(const RoutedLayout& layout, const RoutedRows& x, std::int64_t in_features, const RoutedMatrices& weight,
             const void* bias, std::int64_t out_features, const ActivationSpec& activation, void* hidden,
             const RowTarget<T>& target) {
  using Acc = Accumulate<T>;
  const std::int64_t half = out_features / 2;
  const auto epilogue = [&](const BlockAt& at, Acc* const* parts) {
    if (bias != nullptr) {
      const T* const row = static_cast<const T*>(bias) + at.expert * out_features + at.column;
      add_to_rows(row, at.rows, at.columns, parts[0]);
      if (activation.gated) add_to_rows(row + half, at.rows, at.columns, parts[1]);
    }
    if (hidden != nullptr) {
      for (std::int64_t r = 0; r < at.rows; ++r) {
        T* row = static_cast<T*>(hidden) + (at.position + r) * out_features + at.column;
        for (int j = 0; j < at.columns; j += kWidth<Acc>) {
          store_columns(row, j, at.columns, load(parts[0] + r * kPanel + j));
          if (activation.gated) store_columns(row + half, j, at.columns, load(parts[1] + r * kPanel + j));
        }
      }
    }
    if (activation.function != Activation::kNone) activate_block(activation, at.rows, at.columns, parts);
    target.write(at, parts[0]);
  };
  const auto multiply = [&]<int kParts>() {
    if (has_few_rows(layout)) {
      multiply_few_rows<kParts, T>(layout, x, in_features, weight, out_features, epilogue);
    } else {
      multiply_experts<kParts, T, Op>(layout, x, in_features, weight, out_features, epilogue);
    }
  };
  activation.gated ? multiply.template operator()<2>() : multiply.template operator()<1>();
  target.finish();
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p) {
  dispatch_types(p.dtype, [&]<typename T, typename Op>() {
    const std::int64_t columns = p.activation.gated ? p.out_features / 2 : p.out_features;
    const RowTarget<T> target(p.layout, p.out_order, p.out, columns, columns, p.gates);
    project<T, Op>(p.layout, p.x, p.in_features, p.weight, p.bias, p.out_features, p.activation, p.hidden, target);
  });
}

void expert_ffn(const ExpertFfnParams& p) {
  dispatch_types(p.dtype, [&]<typename T, typename Op>() {
    const std::int64_t stride = operand_stride<T>(p.hidden_features);
    const Scratch<T> activated(p.layout.num_slots() * stride);
    const RowTarget<T> inner(p.layout, RowOrder::kExpert, activated.data(), p.hidden_features, stride, nullptr);
    project<T, Op>(p.layout, p.x, p.model_features, p.up, p.up_bias,
                   p.activation.gated ? 2 * p.hidden_features : p.hidden_features, p.activation, p.hidden, inner);
    const RoutedRows rows{activated.data(), RowOrder::kExpert, stride, 0};
    const RowTarget<T> outer(p.layout, RowOrder::kToken, p.out, p.model_features, p.model_features, p.gates);
    project<T, Op>(p.layout, rows, p.hidden_features, p.down, p.down_bias, p.model_features, {}, nullptr, outer);
  });
}

}  // namespace mfx::MFX_ISA
