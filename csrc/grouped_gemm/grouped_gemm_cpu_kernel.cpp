// Forward: rows are gathered into expert order once, then every task packs one block of columns of one expert's
// matrix and multiplies all of the expert's rows by it; activation and the way out happen per 64 x 64 block. Where all
// experts have few rows, as in decoding, the matrices are streamed instead of packed.
#include "grouped_gemm/epilogue.hpp"
#include "grouped_gemm/few_rows.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {
namespace {

template <typename T, typename Op>
void project(const RoutedLayout& layout, const RoutedRows& x, std::int64_t in_features, const void* const* weight,
             std::int64_t out_features, const ActivationSpec& activation, void* hidden, const RowTarget<T>& target) {
  using Acc = Accumulate<T>;
  const std::int64_t half = out_features / 2;
  const auto epilogue = [&](std::int64_t p, std::int64_t rows, std::int64_t n, int columns, Acc* const* parts) {
    if (hidden != nullptr) {
      for (std::int64_t r = 0; r < rows; ++r) {
        T* row = static_cast<T*>(hidden) + (p + r) * out_features + n;
        for (int j = 0; j < columns; j += kWidth<Acc>) {
          store_columns(row, j, columns, load(parts[0] + r * kPanel + j));
          if (activation.gated) store_columns(row + half, j, columns, load(parts[1] + r * kPanel + j));
        }
      }
    }
    if (activation.function != Activation::kNone) activate_block(activation, rows, columns, parts);
    target.write(p, rows, n, columns, parts[0]);
  };
  const auto multiply = [&]<int kParts>() {
    if (has_few_rows(layout)) {
      const Operand<Acc> a = gather_operand<T, Acc>(layout, x, in_features);
      multiply_few_rows<kParts, T>(layout, a, in_features, weight, out_features, epilogue);
    } else {
      const Operand<Op> a = gather_operand<T, Op>(layout, x, in_features);
      multiply_experts<kParts == 2, T>(layout, a, in_features, weight, out_features, epilogue);
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
    project<T, Op>(p.layout, p.x, p.in_features, p.weight, p.out_features, p.activation, p.hidden, target);
  });
}

void expert_ffn(const ExpertFfnParams& p) {
  dispatch_types(p.dtype, [&]<typename T, typename Op>() {
    const std::int64_t stride = operand_stride<T>(p.hidden_features);
    const Scratch<T> activated(p.layout.num_slots() * stride);
    const RowTarget<T> inner(p.layout, RowOrder::kExpert, activated.data(), p.hidden_features, stride, nullptr);
    project<T, Op>(p.layout, p.x, p.model_features, p.up,
                   p.activation.gated ? 2 * p.hidden_features : p.hidden_features, p.activation, p.hidden, inner);
    const RoutedRows rows{activated.data(), RowOrder::kExpert, stride, 0};
    const RowTarget<T> outer(p.layout, RowOrder::kToken, p.out, p.model_features, p.model_features, p.gates);
    project<T, Op>(p.layout, rows, p.hidden_features, p.down, p.model_features, {}, nullptr, outer);
  });
}

}  // namespace mfx::MFX_ISA
