// What grouped_gemm and expert_ffn share at the border to torch: the layout's tensors, rows in their three orders,
// matrices in segments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"
#include "core/scratch.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx {

// The arguments that stand for an ExpertLayout in a schema.
struct LayoutTensors {
  at::Tensor offsets, slot_order, position;
  int64_t num_choices;

  c10::SymInt num_experts() const { return offsets.sym_size(0) - 1; }
  c10::SymInt num_slots() const { return slot_order.sym_size(0); }
  c10::SymInt num_tokens() const { return num_slots() / num_choices; }

  RoutedLayout view() const {
    return {offsets.const_data_ptr<int32_t>(),  slot_order.const_data_ptr<int32_t>(),
            position.const_data_ptr<int32_t>(), offsets.size(0) - 1,
            slot_order.size(0) / num_choices,   num_choices};
  }
};

inline void check_layout(const char* op, const LayoutTensors& layout, const at::Tensor& x) {
  const auto check = [&](const char* name, const at::Tensor& tensor) {
    check_dim(op, name, tensor, 1);
    MFX_CHECK_ARG(tensor.scalar_type() == at::kInt, op, name, "be int32", tensor.scalar_type());
    MFX_CHECK_ARG(tensor.is_contiguous(), op, name, "be contiguous", "strides ", tensor.sym_strides());
    check_same_device(op, name, tensor, "x", x);
  };
  check("layout.offsets", layout.offsets);
  check("layout.slot_order", layout.slot_order);
  check("layout.position", layout.position);
  MFX_CHECK_ARG(layout.num_choices >= 1, op, "layout.num_choices", "be at least 1", layout.num_choices);
  MFX_CHECK_ARG(layout.offsets.sym_size(0) >= 2, op, "layout.offsets", "have num_experts + 1 elements",
                layout.offsets.sym_size(0));
  MFX_CHECK_ARG(layout.num_slots() % layout.num_choices == 0, op, "layout.slot_order",
                c10::str("have a multiple of num_choices (", layout.num_choices, ") elements"), layout.num_slots());
  MFX_CHECK_ARG(layout.position.sym_size(0) == layout.num_slots(), op, "layout.position",
                c10::str("have as many elements as layout.slot_order (", layout.num_slots(), ")"),
                layout.position.sym_size(0));
}

inline RowOrder parse_order(const char* op, const char* argument, std::string_view name) {
  if (name == "token") return RowOrder::kToken;
  if (name == "slot") return RowOrder::kSlot;
  MFX_CHECK_ARG(name == "expert", op, argument, "be 'token', 'slot' or 'expert'", "'", name, "'");
  return RowOrder::kExpert;
}

struct NamedActivation {
  std::string_view name;
  ActivationSpec spec;
};
inline constexpr NamedActivation kActivations[] = {
    {"gelu_tanh", {Activation::kGeluTanh, false}}, {"gelu", {Activation::kGelu, false}},
    {"silu", {Activation::kSilu, false}},          {"relu", {Activation::kRelu, false}},
    {"geglu_tanh", {Activation::kGeluTanh, true}}, {"geglu", {Activation::kGelu, true}},
    {"swiglu", {Activation::kSilu, true}},         {"reglu", {Activation::kRelu, true}},
};

inline ActivationSpec parse_activation(const char* op, std::string_view name) {
  std::string known;
  for (const NamedActivation& activation : kActivations) {
    if (activation.name == name) return activation.spec;
    known += c10::str(known.empty() ? "'" : ", '", activation.name, "'");
  }
  MFX_CHECK_ARG(false, op, "activation", c10::str("be one of ", known), "'", name, "'");
}

// The shape of rows of `columns` elements in a given order.
inline c10::SymDimVector rows_shape(const LayoutTensors& layout, RowOrder order, const c10::SymInt& columns) {
  switch (order) {
    case RowOrder::kToken: return {layout.num_tokens(), columns};
    case RowOrder::kSlot: return {layout.num_tokens(), layout.num_choices, columns};
    case RowOrder::kExpert: break;
  }
  return {layout.num_slots(), columns};
}

inline void check_rows(const char* op, const char* argument, const at::Tensor& rows, const LayoutTensors& layout,
                       RowOrder order) {
  const bool slots = order == RowOrder::kSlot;
  const c10::SymInt leading = order == RowOrder::kExpert ? layout.num_slots() : layout.num_tokens();
  const bool fits = rows.dim() == (slots ? 3 : 2) && rows.sym_size(0) == leading &&
                    (!slots || rows.sym_size(1) == layout.num_choices) && rows.sym_size(-1) >= 1;
  MFX_CHECK_ARG(fits, op, argument,
                slots ? c10::str("have shape [", leading, ", ", layout.num_choices, ", features] as the layout says")
                      : c10::str("have shape [", leading, ", features] as the layout says"),
                "shape ", rows.sym_sizes());
}

// Rows whose last dimension is contiguous, copied only where it is not.
inline at::Tensor with_unit_stride(const at::Tensor& rows) {
  return rows.stride(-1) == 1 || rows.size(-1) == 1 ? rows : rows.contiguous();
}

inline RoutedRows view_rows(const at::Tensor& rows, RowOrder order) {
  return {rows.const_data_ptr(), order, rows.stride(0), order == RowOrder::kSlot ? rows.stride(1) : 0};
}

// Matrices [E_i, in, out] of consecutive experts, which must add up to those of `owner`.
inline void check_segments(const char* op, const char* argument, at::TensorList segments,
                           const c10::SymInt& num_experts, const char* owner, const at::Tensor& x) {
  MFX_CHECK_ARG(!segments.empty(), op, argument, "be a tensor or a non-empty sequence of tensors", "none");
  c10::SymInt experts = 0;
  for (const at::Tensor& segment : segments) {
    check_dim(op, argument, segment, 3);
    check_same_dtype(op, argument, segment, "x", x);
    check_same_device(op, argument, segment, "x", x);
    MFX_CHECK_ARG(segment.sym_size(1) == segments[0].sym_size(1) && segment.sym_size(2) == segments[0].sym_size(2), op,
                  argument, "have segments that agree in their last two dimensions", "shapes ", segments[0].sym_sizes(),
                  " and ", segment.sym_sizes());
    experts += segment.sym_size(0);
  }
  MFX_CHECK_ARG(segments[0].sym_size(1) >= 1 && segments[0].sym_size(2) >= 1, op, argument,
                "have at least one row and one column per expert", "shape ", segments[0].sym_sizes());
  MFX_CHECK_ARG(experts == num_experts, op, argument,
                c10::str("have as many experts as ", owner, " (", num_experts, ")"), experts);
}
inline void check_segments(const char* op, const char* argument, at::TensorList segments, const LayoutTensors& layout,
                           const at::Tensor& x) {
  check_segments(op, argument, segments, layout.num_experts(), "the layout", x);
}

// Rows and columns of an expert's matrix.
struct ExpertShape {
  c10::SymInt in, out;
};

// Both projections of an expert's feed-forward network beside x [..., features].
inline void check_ffn(const char* op, const at::Tensor& x, const ExpertShape& up, const ExpertShape& down, bool gated) {
  const auto& [features, columns] = up;
  MFX_CHECK_ARG(x.sym_size(-1) == features, op, "x", c10::str("have as many features as up has rows (", features, ")"),
                x.sym_size(-1));
  MFX_CHECK_ARG(!gated || columns % 2 == 0, op, "up", "have an even number of columns for a gated activation", columns);
  const c10::SymInt hidden = gated ? columns / 2 : columns;
  MFX_CHECK_ARG(down.in == hidden && down.out == features, op, "down",
                c10::str("have shape [num_experts, ", hidden, ", ", features, "] beside this up"),
                "shape [num_experts, ", down.in, ", ", down.out, "]");
}

inline void check_gates(const char* op, const at::Tensor& gates, const LayoutTensors& layout, const at::Tensor& x) {
  check_dim(op, "gates", gates, 2);
  MFX_CHECK_ARG(gates.sym_size(0) == layout.num_tokens() && gates.sym_size(1) == layout.num_choices, op, "gates",
                c10::str("have shape [", layout.num_tokens(), ", ", layout.num_choices, "] as the layout says"),
                "shape ", gates.sym_sizes());
  const at::ScalarType expected = result_type(x);
  MFX_CHECK_ARG(gates.scalar_type() == expected, op, "gates",
                c10::str("be ", expected, " beside x of ", x.scalar_type()), gates.scalar_type());
  check_same_device(op, "gates", gates, "x", x);
}

// The gradient of rows in the output's order.
inline void check_grad(const char* op, const at::Tensor& grad, const LayoutTensors& layout, RowOrder order,
                       const c10::SymInt& columns, const at::Tensor& x) {
  check_rows(op, "grad", grad, layout, order);
  check_same_dtype(op, "grad", grad, "x", x);
  check_same_device(op, "grad", grad, "x", x);
  MFX_CHECK_ARG(grad.sym_size(-1) == columns, op, "grad", c10::str("have ", columns, " columns like the output"),
                grad.sym_size(-1));
}

// The pre-activation that the forward pass saved.
inline void check_hidden(const char* op, const at::Tensor& hidden, at::SymIntArrayRef shape, const at::Tensor& x) {
  check_tensor(op, "hidden", hidden, shape, x.scalar_type(), "x", x);
}

// Biases [E, columns], one for each expert, added to what its matrix makes.
inline void check_bias(const char* op, const char* argument, const OptionalTensor& bias, const LayoutTensors& layout,
                       const c10::SymInt& columns, const at::Tensor& x) {
  if (bias) check_tensor(op, argument, *bias, {layout.num_experts(), columns}, x.scalar_type(), "x", x);
}

// Whether memory holds every matrix of all segments as contiguous rows, or those of its transpose, at the same
// distances.
inline bool lie_in_rows(at::TensorList segments, bool transposed) {
  const int64_t row = transposed ? 2 : 1, inner = 3 - row;
  std::optional<c10::SymInt> distance;  // between the matrices of a segment
  for (const at::Tensor& t : segments) {
    if (t.sym_size(inner) > 1 && t.sym_stride(inner) != 1) return false;
    const bool same_rows = t.sym_stride(row) == segments[0].sym_stride(row) && t.sym_stride(row) >= t.sym_size(inner);
    if (t.sym_size(row) > 1 && !same_rows) return false;
    if (t.sym_size(0) <= 1) continue;
    if (distance && *distance != t.sym_stride(0)) return false;
    distance = t.sym_stride(0);
  }
  return true;
}
inline bool holds_transposes(at::TensorList segments) {
  return !lie_in_rows(segments, false) && lie_in_rows(segments, true);
}

// The matrices of an argument, or gradients of them, for the kernels. Matrices that lie otherwise are copied.
class MatrixOperand {
 public:
  explicit MatrixOperand(at::TensorList segments) : transposed_(holds_transposes(segments)) {
    const bool readable = transposed_ || lie_in_rows(segments, false);
    for (const at::Tensor& segment : segments) segments_.push_back(readable ? segment : segment.contiguous());
    add_pointers(segments_);
  }
  // Gradients that add_gradients() made; no pointers for experts of those not needed.
  MatrixOperand(at::TensorList gradients, const MatrixOperand& of)
      : transposed_(of.transposed_), segments_(gradients.vec()) {
    add_pointers(of.segments_);
  }

  int64_t rows() const { return segments_[0].size(1); }
  int64_t columns() const { return segments_[0].size(2); }
  size_t num_segments() const { return segments_.size(); }
  RoutedMatrices view() const { return {pointers_.data(), stride_, expert_stride_, transposed_}; }

 private:
  void add_pointers(const std::vector<at::Tensor>& shapes) {
    const int64_t rows = shapes[0].size(1), columns = shapes[0].size(2);
    stride_ = transposed_ ? rows : columns;
    expert_stride_ = rows * columns;
    for (size_t i = 0; i < segments_.size(); ++i) {
      const at::Tensor& segment = segments_[i];
      const int64_t experts = shapes[i].size(0), row = transposed_ ? 2 : 1;
      if (segment.numel() == 0) {
        pointers_.insert(pointers_.end(), experts, nullptr);
        continue;
      }
      if (segment.size(row) > 1) stride_ = segment.stride(row);
      if (experts > 1) expert_stride_ = segment.stride(0);
      char* const data = static_cast<char*>(const_cast<void*>(segment.const_data_ptr()));
      const int64_t bytes = segment.stride(0) * static_cast<int64_t>(segment.element_size());
      for (int64_t e = 0; e < experts; ++e) pointers_.push_back(data + e * bytes);
    }
  }

  bool transposed_;
  std::vector<at::Tensor> segments_;
  std::vector<void*> pointers_;
  int64_t stride_ = 0, expert_stride_ = 0;
};

// Fresh memory of any size is written at once by the kernels: large pages save most of the faults.
inline at::Tensor empty_rows(at::SymIntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty_symint(shape, options);
  if (tensor.device().is_cpu() && tensor.has_storage() && tensor.key_set().has_backend(c10::BackendComponent::CPUBit)) {
    advise_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  }
  return tensor;
}

inline void* data_or_null(const at::Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.data_ptr() : nullptr;
}
inline const void* const_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr;
}

// Undefined for none.
inline at::Tensor contiguous(const OptionalTensor& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

// ---- Two ops of one kind: X for callers, X_forward and X_backward below it ----
//
// Routed describes an op:
//   kOp, Args, Needs          its name, its arguments, and the flags that say which gradients backward shall compute
//   check                     the arguments' checks
//   out_shape, out_order      rows of the output
//   hidden_shape              the pre-activation that forward may save and backward reads
//   inputs                    what may require grad, undefined tensors included
//   allocate_gradients        one for each input, an empty tensor for those not needed
//   Params, BackwardParams    what the kernels take; Operands holds the tensors that they point into
//   set_gradients             points BackwardParams to gradients, and returns what the pointers need to live
//   launch                    runs the kernels for either params
//   forward, backward         the ops below X, called through the dispatcher
//   autocast                  the kernel of the Autocast keys

template <typename Routed>
struct RoutedForwardArgs {
  typename Routed::Args args;
  bool save_hidden;
};
template <typename Routed>
struct RoutedBackwardArgs {
  at::Tensor grad;
  typename Routed::Args args;
  at::Tensor hidden;
  typename Routed::Needs needs;
};

template <typename Routed, bool kMeta>
std::tuple<at::Tensor, at::Tensor> routed_forward(const RoutedForwardArgs<Routed>& f) {
  const auto& a = f.args;
  Routed::check(a);
  const at::Tensor out = empty_rows(Routed::out_shape(a), a.x.options());
  const at::Tensor hidden = f.save_hidden ? empty_rows(Routed::hidden_shape(a), a.x.options()) : no_tensor(a.x);
  if constexpr (!kMeta) {
    const Backend backend = backend_of(Routed::kOp, "x", a.x);
    const typename Routed::Operands operands(a);
    typename Routed::Params params = operands.params(a, backend);
    params.out = out.mutable_data_ptr();
    params.hidden = data_or_null(hidden);
    Routed::launch(backend, a, params);
  }
  return {out, hidden};
}

template <typename Routed, bool kMeta>
std::vector<at::Tensor> routed_backward(const RoutedBackwardArgs<Routed>& b) {
  const auto& [grad, a, hidden, needs] = b;
  Routed::check(a);
  check_grad(Routed::kOp, grad, a.layout, Routed::out_order(a), Routed::out_shape(a).back(), a.x);
  check_hidden(Routed::kOp, hidden, Routed::hidden_shape(a), a.x);
  const std::vector<at::Tensor> gradients = Routed::allocate_gradients(a, needs);
  if constexpr (!kMeta) {
    const Backend backend = backend_of(Routed::kOp, "x", a.x);
    const typename Routed::Operands operands(a);
    const at::Tensor grad_rows = with_unit_stride(grad), saved = hidden.contiguous();
    typename Routed::BackwardParams params{};
    params.forward = operands.params(a, backend);
    params.forward.hidden = data_or_null(saved);
    params.grad = view_rows(grad_rows, Routed::out_order(a));
    const auto pointers = Routed::set_gradients(params, gradients, operands);
    Routed::launch(backend, a, params);
  }
  return gradients;
}

// A gradient for each segment of an argument, laid out as the argument is; an empty tensor for those not needed.
inline void add_gradients(std::vector<at::Tensor>& gradients, const char* op, const char* needs_name,
                          at::TensorList segments, const c10::List<bool>& needs) {
  MFX_CHECK_ARG(needs.size() == segments.size(), op, needs_name,
                c10::str("have one entry per segment (", segments.size(), ")"), needs.size());
  const bool transposed = holds_transposes(segments);
  for (size_t i = 0; i < segments.size(); ++i) {
    if (!needs[i]) {
      gradients.push_back(no_tensor(segments[i]));
      continue;
    }
    const c10::SymInt experts = segments[i].sym_size(0), rows = segments[i].sym_size(1),
                      columns = segments[i].sym_size(2);
    gradients.push_back(transposed ? empty_rows({experts, columns, rows}, segments[i].options()).transpose(1, 2)
                                   : empty_rows({experts, rows, columns}, segments[i].options()));
  }
}

// The gradient of an argument that may be missing or not needed.
inline at::Tensor gradient_like(const OptionalTensor& tensor, bool needed, const at::Tensor& x) {
  return needed && tensor ? empty_rows(tensor->sym_sizes(), tensor->options()) : no_tensor(x);
}

inline c10::List<bool> slice(const c10::List<bool>& flags, size_t begin, size_t end) {
  c10::List<bool> part;
  for (size_t i = begin; i < end; ++i) part.push_back(flags[i]);
  return part;
}

template <typename Routed>
struct RoutedFunction : torch::autograd::Function<RoutedFunction<Routed>> {
  using Args = typename Routed::Args;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList /*inputs*/, const Args& a) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, hidden] = Routed::forward(a, /*save_hidden=*/true);
    save_args(ctx, a, hidden);
    return out;
  }

  static std::vector<at::Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<at::Tensor>& grads) {
    const auto [a, hidden] = saved_args<Args, at::Tensor>(ctx);
    const std::vector<at::Tensor> inputs = Routed::inputs(a);
    const c10::List<bool> needs = needed_gradients(ctx, inputs);
    std::vector<at::Tensor> gradients = Routed::backward(grads[0], a, hidden, needs);
    for (size_t i = 0; i < needs.size(); ++i) {
      if (!needs[i]) gradients[i] = at::Tensor();
    }
    return gradients_of_defined(inputs, gradients);
  }
};

template <typename Routed>
at::Tensor below_autograd(const typename Routed::Args& a) {
  return std::get<0>(Routed::forward(a, /*save_hidden=*/false));
}

template <typename Routed>
at::Tensor autograd(const typename Routed::Args& a) {
  const std::vector<at::Tensor> inputs = Routed::inputs(a);
  refuse_forward_mode(Routed::kOp, at::TensorList(inputs));
  if (records_grad(at::TensorList(inputs))) return apply<RoutedFunction<Routed>>(inputs, a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return below_autograd<Routed>(a);
}

template <typename Routed>
void define(torch::Library& library, const std::string& args, const std::string& needs) {
  using enum c10::DispatchKey;
  const std::string name = Routed::kOp;
  Definition(library, name + "(" + args + ") -> Tensor")
      .template kernel<&below_autograd<Routed>>({CPU, CUDA, Meta})
      .template kernel<&autograd<Routed>>({Autograd})
      .template kernel<&Routed::autocast>({AutocastCPU, AutocastCUDA});
  Definition(library, name + "_forward(" + args + ", bool save_hidden) -> (Tensor out, Tensor hidden)")
      .template kernel<&routed_forward<Routed, false>>({CPU, CUDA})
      .template kernel<&routed_forward<Routed, true>>({Meta})
      .kernel(Autograd, not_differentiable());
  Definition(library, name + "_backward(Tensor grad, " + args + ", Tensor hidden, bool needs_x, bool needs_gates, " +
                          needs + ") -> Tensor[]")
      .template kernel<&routed_backward<Routed, false>>({CPU, CUDA})
      .template kernel<&routed_backward<Routed, true>>({Meta})
      .kernel(Autograd, not_differentiable());
}

}  // namespace mfx
