// What happens to a finished block of a product, [rows, kPanel] in the accumulation type: bias, activation, its
// backward, and the way out to rows in token, slot or expert order.
#pragma once

#include "core/brgemm.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "grouped_gemm/activation.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {

// f<T, Op>(): storage and operand types of a dtype. fp16 is always widened, bf16 where there is no bf16 product.
template <typename F>
inline void dispatch_types(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float, float>();
    case DType::kFloat64: return f.template operator()<double, double>();
    case DType::kFloat16: return f.template operator()<Float16, float>();
    case DType::kBFloat16:
      if (brgemm_available_bf16()) return f.template operator()<BFloat16, BFloat16>();
      return f.template operator()<BFloat16, float>();
  }
}

// Adds the same row to all rows of a block.
template <typename T, typename Acc>
void add_to_rows(const T* row, std::int64_t rows, int columns, Acc* c) {
  for (int j = 0; j < columns; j += kWidth<Acc>) {
    const Vec<Acc> v = load_columns(row, j, columns);
    for (std::int64_t r = 0; r < rows; ++r) store(c + r * kPanel + j, load(c + r * kPanel + j) + v);
  }
}

// In place in parts[0]: activation(c), or activation(first part) * second part.
template <typename Acc>
void activate_block(const ActivationSpec& spec, std::int64_t rows, int columns, Acc* const* parts) {
  dispatch_activation(spec.function, [&](auto tag) {
    for (std::int64_t r = 0; r < rows; ++r) {
      Acc* c = parts[0] + r * kPanel;
      for (int j = 0; j < columns; j += kWidth<Acc>) {
        Vec<Acc> v = activate<decltype(tag)::value>(load(c + j));
        if (spec.gated) v *= load(parts[1] + r * kPanel + j);
        store(c + j, v);
      }
    }
  });
}

// Backward of a = activation(h) followed by a gate: one block of columns of one row.
template <typename T>
struct ActivationBackwardRow {
  const T* hidden;  // h, or its activated half; the other half begins at + half
  T* grad_hidden;   // likewise
  T* gated;         // gate * a, or null
  std::int64_t half;
  Accumulate<T> gate;
};

// `grad` is <dL/d(gate * a)>; writes dL/dh and gate * a, returns <grad, a>.
template <typename T>
Accumulate<T> activation_backward(const ActivationSpec& spec, const ActivationBackwardRow<T>& row, int columns,
                                  const Accumulate<T>* grad) {
  using Acc = Accumulate<T>;
  Vec<Acc> dot = {};
  dispatch_activation(spec.function, [&](auto tag) {
    for (int j = 0; j < columns; j += kWidth<Acc>) {
      const Vec<Acc> g = load_columns(grad, j, columns);
      const auto a = activate_with_slope<decltype(tag)::value>(load_columns(row.hidden, j, columns));
      Vec<Acc> value = a.value, slope = a.slope;
      if (spec.gated) {
        const Vec<Acc> other = load_columns(row.hidden + row.half, j, columns);
        store_columns(row.grad_hidden + row.half, j, columns, row.gate * g * value);
        value *= other;
        slope *= other;
      }
      store_columns(row.grad_hidden, j, columns, row.gate * g * slope);
      if (row.gated != nullptr) store_columns(row.gated, j, columns, row.gate * value);
      dot += g * value;
    }
  });
  return reduce_add(dot);
}

// Where a product's rows go. In token order with several choices per token they are kept apart, in the accumulation
// type, until finish() sums them in the order of the choices: no atomics, the same bits every time.
template <typename T>
class RowTarget {
 public:
  using Acc = Accumulate<T>;

  // gates ([T, K], or null) multiply the rows on their way to token order.
  RowTarget(const RoutedLayout& layout, RowOrder order, void* out, std::int64_t columns, std::int64_t stride,
            const void* gates)
      : layout_(layout),
        out_(static_cast<T*>(out)),
        columns_(columns),
        stride_(stride),
        gates_(static_cast<const Acc*>(gates)),
        in_expert_order_(order == RowOrder::kExpert),
        sums_(order == RowOrder::kToken && layout.num_choices > 1) {
    if (sums_) rows_ = Scratch<Acc>(layout.num_slots() * columns);
  }

  void write(const BlockAt& at, const Acc* c) const {
    for (std::int64_t p = at.position; p < at.position + at.rows; ++p, c += kPanel) {
      if (sums_) {
        Acc* row = rows_.data() + p * columns_ + at.column;
        for (int j = 0; j < at.columns; j += kWidth<Acc>) store_columns(row, j, at.columns, load(c + j));
        continue;
      }
      const std::int64_t slot = layout_.slot_order[p];
      T* row = out_ + (in_expert_order_ ? p : slot) * stride_ + at.column;
      const Acc gate = gates_ != nullptr ? gates_[slot] : Acc(1);
      for (int j = 0; j < at.columns; j += kWidth<Acc>) store_columns(row, j, at.columns, gate * load(c + j));
    }
  }

  void finish() const {
    if (!sums_) return;
    const std::int64_t choices = layout_.num_choices;
    parallel_for(layout_.num_tokens, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        for (std::int64_t c = 0; c < columns_; c += kWidth<Acc>) {
          Vec<Acc> sum = {};
          for (std::int64_t slot = t * choices; slot < (t + 1) * choices; ++slot) {
            const Vec<Acc> row = load_columns(rows_.data() + layout_.position[slot] * columns_, c, columns_);
            sum += gates_ != nullptr ? gates_[slot] * row : row;
          }
          store_columns(out_ + t * stride_, c, columns_, sum);
        }
      }
    });
  }

 private:
  const RoutedLayout& layout_;
  T* out_;
  std::int64_t columns_, stride_;
  const Acc* gates_;
  bool in_expert_order_, sums_;
  Scratch<Acc> rows_;
};

// Gradients of the gates, gathered as one partial dot product per (block of columns, position).
template <typename Acc>
class GateGradient {
 public:
  GateGradient(const RoutedLayout& layout, std::int64_t columns, void* out)
      : layout_(layout), blocks_((columns + kPanel - 1) / kPanel), out_(static_cast<Acc*>(out)) {
    if (out_ != nullptr) partial_ = Scratch<Acc>(blocks_ * layout.num_slots());
  }

  bool wanted() const { return out_ != nullptr; }
  void add(std::int64_t p, std::int64_t first_column, Acc dot) const {
    if (wanted()) partial_.data()[first_column / kPanel * layout_.num_slots() + p] = dot;
  }
  // Also adds dot(p) to the gradient of each position's gate.
  template <typename Dot>
  void finish(Dot dot) const {
    if (!wanted()) return;
    const std::int64_t slots = layout_.num_slots();
    parallel_for(slots, 1024, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) {
        Acc sum = dot(p);
        for (std::int64_t block = 0; block < blocks_; ++block) sum += partial_.data()[block * slots + p];
        out_[layout_.slot_order[p]] = sum;
      }
    });
  }
  void finish() const {
    finish([](std::int64_t) { return Acc(0); });
  }

 private:
  const RoutedLayout& layout_;
  std::int64_t blocks_;
  Acc* out_;
  Scratch<Acc> partial_;
};

}  // namespace mfx::MFX_ISA
