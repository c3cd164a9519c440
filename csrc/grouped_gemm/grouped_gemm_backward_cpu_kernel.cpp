// Backward, from x, the matrices and the pre-activation alone. The gradient of a gate is the dot product of the
// expert's output with the incoming gradient; <dy, x W> = <dy W^T, x> comes for free with the product that the
// gradient of x needs, so no output is saved.
#include "grouped_gemm/epilogue.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {
namespace {

// Gradient of the rows: gate * (g W^T) to `target`, and <g W^T, x> to `gate_gradient`.
template <typename T, typename Op>
void backproject(const RoutedLayout& layout, const RoutedRows& grad, const void* const* weight,
                 std::int64_t in_features, std::int64_t out_features, const RoutedRows& x, const Accumulate<T>* gates,
                 const RowTarget<T>* target, const GateGradient<Accumulate<T>>& gate_gradient) {
  using Acc = Accumulate<T>;
  const RowReader<T> x_row(x, layout);
  multiply_experts_transposed<T, Op>(layout, grad, weight, in_features, out_features,
                                     [&](std::int64_t p, std::int64_t rows, std::int64_t i, int columns, Acc* c) {
                                       for (std::int64_t r = 0; r < rows; ++r) {
                                         Acc* row = c + r * kPanel;
                                         if (gate_gradient.wanted()) {
                                           const T* x_block = x_row(p + r) + i;
                                           Vec<Acc> dot = {};
                                           for (int j = 0; j < columns; j += kWidth<Acc>) {
                                             dot += load_columns(row, j, columns) * load_columns(x_block, j, columns);
                                           }
                                           gate_gradient.add(p + r, i, reduce_add(dot));
                                         }
                                         if (gates != nullptr && target != nullptr) {
                                           const Acc gate = gates[layout.slot_order[p + r]];
                                           for (int j = 0; j < columns; j += kWidth<Acc>)
                                             store(row + j, gate * load(row + j));
                                         }
                                       }
                                       if (target != nullptr) target->write(p, rows, i, columns, c);
                                     });
  if (target != nullptr) target->finish();
  gate_gradient.finish();
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

bool any(void* const* pointers, std::int64_t n) {
  return pointers != nullptr && std::any_of(pointers, pointers + n, [](const void* p) { return p != nullptr; });
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
    if (any(p.grad_weight, layout.num_experts)) {
      const auto scale = [&](std::int64_t q) { return gates != nullptr ? gates[layout.slot_order[q]] : Acc(1); };
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
    multiply_experts_transposed<T, Op>(
        layout, p.grad, f.down, half, f.model_features,
        [&](std::int64_t position, std::int64_t rows, std::int64_t i, int columns, const Acc* c) {
          for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t q = position + r;
            const ActivationBackwardRow<T> row{
                static_cast<const T*>(f.hidden) + q * up_columns + i, grad_hidden.data() + q * hidden_stride + i,
                needs_down ? gated.data() + q * gated_stride + i : nullptr, half, gates[layout.slot_order[q]]};
            gate_gradient.add(q, i, activation_backward(f.activation, row, columns, c + r * kPanel));
          }
        });
    gate_gradient.finish();

    if (needs_down) {
      const RoutedRows rows{gated.data(), RowOrder::kExpert, gated_stride, 0};
      accumulate_experts<T, Op>(layout, rows, one, p.grad, p.grad_down, half, f.model_features);
    }
    const RoutedRows rows{grad_hidden.data(), RowOrder::kExpert, hidden_stride, 0};
    if (needs_up) accumulate_experts<T, Op>(layout, f.x, one, rows, p.grad_up, f.model_features, up_columns);
    if (p.grad_x != nullptr) {
      const RowTarget<T> target(layout, RowOrder::kToken, p.grad_x, f.model_features, f.model_features, nullptr);
      backproject<T, Op>(layout, rows, f.up, f.model_features, up_columns, f.x, nullptr, &target,
                         GateGradient<Acc>(layout, f.model_features, nullptr));
    }
  });
}

}  // namespace mfx::MFX_ISA
