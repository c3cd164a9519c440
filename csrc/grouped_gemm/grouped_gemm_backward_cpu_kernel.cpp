// Backward, from x, the matrices and the pre-activation alone. The gradient of a gate is the dot product of the
// expert's output with the incoming gradient; <dy, x W> = <dy W^T, x> comes for free with the product that the
// gradient of x needs, so no output is saved.
#include "grouped_gemm/epilogue.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {
namespace {

// <g, bias> of a position's expert, for the gradient of its gate; zero without a bias.
template <typename T>
auto bias_dots(const RoutedLayout& layout, const RoutedRows& grad, const void* bias, std::int64_t columns) {
  using Acc = Accumulate<T>;
  return [&layout, columns, bias = static_cast<const T*>(bias), row = RowReader<T>(grad, layout)](std::int64_t p) {
    if (bias == nullptr) return Acc(0);
    const std::int32_t* const end = layout.offsets + layout.num_experts + 1;
    const std::int64_t expert = std::upper_bound(layout.offsets, end, p) - layout.offsets - 1;
    Vec<Acc> dot = {};
    for (std::int64_t j = 0; j < columns; j += kWidth<Acc>) {
      dot += load_columns(row(p), j, columns) * load_columns(bias + expert * columns, j, columns);
    }
    return reduce_add(dot);
  };
}

// grad_bias[e] = sum over the expert's positions of scale(p) * g[p], in their order.
template <typename T, typename Scale>
void sum_experts(const RoutedLayout& layout, const RoutedRows& grad, Scale scale, void* grad_bias,
                 std::int64_t columns) {
  using Acc = Accumulate<T>;
  if (grad_bias == nullptr) return;
  const RowReader<T> row(grad, layout);
  const std::int64_t panels = (columns + kPanel - 1) / kPanel;
  parallel_tasks(layout.num_experts * panels, [&](std::int64_t task) {
    const std::int64_t expert = task / panels, n = task % panels * kPanel;
    const int width = static_cast<int>(std::min<std::int64_t>(kPanel, columns - n));
    Vec<Acc> sums[kPanel / kWidth<Acc>] = {};
    for (std::int64_t p = layout.offsets[expert]; p < layout.offsets[expert + 1]; ++p) {
      const T* const g = row(p) + n;
      const Acc factor = scale(p);
      for (int j = 0; j < width; j += kWidth<Acc>) sums[j / kWidth<Acc>] += factor * load_columns(g, j, width);
    }
    T* const out = static_cast<T*>(grad_bias) + expert * columns + n;
    for (int j = 0; j < width; j += kWidth<Acc>) store_columns(out, j, width, sums[j / kWidth<Acc>]);
  });
}

// Gradient of the rows: gate * (g W^T) to `target`, and <g W^T, x> to `gate_gradient`.
template <typename T, typename Op>
void backproject(const RoutedLayout& layout, const RoutedRows& grad, const RoutedMatrices& weight,
                 std::int64_t in_features, std::int64_t out_features, const RoutedRows& x, const Accumulate<T>* gates,
                 const RowTarget<T>* target, const GateGradient<Accumulate<T>>& gate_gradient) {
  using Acc = Accumulate<T>;
  const RowReader<T> x_row(x, layout);
  const auto epilogue = [&](const BlockAt& at, Acc* const* parts) {
    for (std::int64_t r = 0; r < at.rows; ++r) {
      Acc* const row = parts[0] + r * kPanel;
      const std::int64_t p = at.position + r;
      if (gate_gradient.wanted()) {
        const T* const x_block = x_row(p) + at.column;
        Vec<Acc> dot = {};
        for (int j = 0; j < at.columns; j += kWidth<Acc>) {
          dot += load_columns(row, j, at.columns) * load_columns(x_block, j, at.columns);
        }
        gate_gradient.add(p, at.column, reduce_add(dot));
      }
      if (gates != nullptr && target != nullptr) {
        const Acc gate = gates[layout.slot_order[p]];
        for (int j = 0; j < at.columns; j += kWidth<Acc>) store(row + j, gate * load(row + j));
      }
    }
    if (target != nullptr) target->write(at, parts[0]);
  };
  multiply_experts<1, T, Op>(layout, grad, out_features, weight.transpose(), in_features, epilogue);
  if (target != nullptr) target->finish();
}

// Through the activation: incoming gradient in any order to the gradient of the pre-activation, in expert order.
template <typename T>
void activation_backward_rows(const RoutedLayout& layout, const ActivationSpec& activation, const RoutedRows& grad,
                              const void* hidden, std::int64_t columns, const Accumulate<T>* gates, T* grad_hidden,
                              const GateGradient<Accumulate<T>>& gate_gradient) {
  using Acc = Accumulate<T>;
  const RowReader<T> row(grad, layout);
  const std::int64_t out_features = activation.gated ? 2 * columns : columns;
  parallel_for(layout.num_slots(), 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      const Acc gate = gates != nullptr ? gates[layout.slot_order[p]] : Acc(1);
      for (std::int64_t n = 0; n < columns; n += kPanel) {
        const int width = static_cast<int>(std::min<std::int64_t>(kPanel, columns - n));
        Acc block[kPanel];
        for (int j = 0; j < width; j += kWidth<Acc>)
          store_columns(block, j, kPanel, load_columns(row(p) + n, j, width));
        const ActivationBackwardRow<T> at{static_cast<const T*>(hidden) + p * out_features + n,
                                          grad_hidden + p * out_features + n, nullptr, columns, gate};
        gate_gradient.add(p, n, activation_backward(activation, at, width, block));
      }
    }
  });
  gate_gradient.finish();
}

bool any(const RoutedMatrices& matrices, std::int64_t n) {
  return matrices.data != nullptr &&
         std::any_of(matrices.data, matrices.data + n, [](const void* matrix) { return matrix != nullptr; });
}

}  // namespace

void grouped_gemm_backward(const GroupedGemmBackwardParams& p) {
  dispatch_types(p.forward.dtype, [&]<typename T, typename Op>() {
    using Acc = Accumulate<T>;
    const GroupedGemmParams& f = p.forward;
    const RoutedLayout& layout = f.layout;
    const Acc* gates = static_cast<const Acc*>(f.gates);
    const bool activated = f.activation.function != Activation::kNone;
    const std::int64_t columns = f.activation.gated ? f.out_features / 2 : f.out_features;

    // With an activation the gate is folded into the gradient of the pre-activation; without, into the results.
    RoutedRows grad = p.grad;
    Scratch<T> grad_hidden;
    if (activated) {
      grad_hidden = Scratch<T>(layout.num_slots() * f.out_features);
      const GateGradient<Acc> gate_gradient(layout, columns, p.grad_gates);
      activation_backward_rows<T>(layout, f.activation, p.grad, f.hidden, columns, gates, grad_hidden.data(),
                                  gate_gradient);
      grad = {grad_hidden.data(), RowOrder::kExpert, f.out_features, 0};
      gates = nullptr;
    }
    const GateGradient<Acc> gate_gradient(layout, f.in_features, activated ? nullptr : p.grad_gates);
    if (p.grad_x != nullptr) {
      const RowTarget<T> target(layout, f.x.order, p.grad_x, f.in_features, f.in_features, nullptr);
      backproject<T, Op>(layout, grad, f.weight, f.in_features, f.out_features, f.x, gates, &target, gate_gradient);
    } else if (gate_gradient.wanted()) {
      backproject<T, Op>(layout, grad, f.weight, f.in_features, f.out_features, f.x, gates, nullptr, gate_gradient);
    }
    gate_gradient.finish(bias_dots<T>(layout, grad, f.bias, f.out_features));
    const auto scale = [&](std::int64_t q) { return gates != nullptr ? gates[layout.slot_order[q]] : Acc(1); };
    sum_experts<T>(layout, grad, scale, p.grad_bias, f.out_features);
    if (any(p.grad_weight, layout.num_experts)) {
      accumulate_experts<T, Op>(layout, f.x, scale, grad, p.grad_weight, f.in_features, f.out_features);
    }
  });
}

void expert_ffn_backward(const ExpertFfnBackwardParams& p) {
  dispatch_types(p.forward.dtype, [&]<typename T, typename Op>() {
    using Acc = Accumulate<T>;
    const ExpertFfnParams& f = p.forward;
    const RoutedLayout& layout = f.layout;
    const Acc* gates = static_cast<const Acc*>(f.gates);
    const std::int64_t half = f.hidden_features;
    const std::int64_t up_columns = f.activation.gated ? 2 * half : half;
    const bool needs_up = any(p.grad_up, layout.num_experts), needs_down = any(p.grad_down, layout.num_experts);
    const auto one = [](std::int64_t) { return Acc(1); };

    const std::int64_t hidden_stride = operand_stride<T>(up_columns), gated_stride = operand_stride<T>(half);
    const Scratch<T> grad_hidden(layout.num_slots() * hidden_stride);
    Scratch<T> gated;  // gate * activation(h), what the down matrices were multiplied by
    if (needs_down) gated = Scratch<T>(layout.num_slots() * gated_stride);
    const GateGradient<Acc> gate_gradient(layout, half, p.grad_gates);
    const auto epilogue = [&](const BlockAt& at, Acc* const* parts) {
      for (std::int64_t r = 0; r < at.rows; ++r) {
        const std::int64_t q = at.position + r, i = at.column;
        const ActivationBackwardRow<T> row{
            static_cast<const T*>(f.hidden) + q * up_columns + i, grad_hidden.data() + q * hidden_stride + i,
            needs_down ? gated.data() + q * gated_stride + i : nullptr, half, gates[layout.slot_order[q]]};
        gate_gradient.add(q, i, activation_backward(f.activation, row, at.columns, parts[0] + r * kPanel));
      }
    };
    multiply_experts<1, T, Op>(layout, p.grad, f.model_features, f.down.transpose(), half, epilogue);
    gate_gradient.finish(bias_dots<T>(layout, p.grad, f.down_bias, f.model_features));

    const auto gate_of = [&](std::int64_t q) { return gates[layout.slot_order[q]]; };
    sum_experts<T>(layout, p.grad, gate_of, p.grad_down_bias, f.model_features);
    if (needs_down) {
      const RoutedRows rows{gated.data(), RowOrder::kExpert, gated_stride, 0};
      accumulate_experts<T, Op>(layout, rows, one, p.grad, p.grad_down, half, f.model_features);
    }
    const RoutedRows rows{grad_hidden.data(), RowOrder::kExpert, hidden_stride, 0};
    sum_experts<T>(layout, rows, one, p.grad_up_bias, up_columns);
    if (needs_up) accumulate_experts<T, Op>(layout, f.x, one, rows, p.grad_up, f.model_features, up_columns);
    if (p.grad_x != nullptr) {
      const RowTarget<T> target(layout, RowOrder::kToken, p.grad_x, f.model_features, f.model_features, nullptr);
      backproject<T, Op>(layout, rows, f.up, f.model_features, up_columns, f.x, nullptr, &target,
                         GateGradient<Acc>(layout, f.model_features, nullptr));
    }
  });
}

}  // namespace mfx::MFX_ISA
