#include "moduleformer_ext/stick_attention.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <string>
#include <tuple>

#include "bindings/attention.hpp"
#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"

namespace mfx {
namespace {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // o, remainder, residual, first_tiles
using Grads = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "stick_attention";

struct Inputs {
  Tensor q, k;
  OptionalTensor v;
};
struct Options {
  std::optional<double> scale;
  bool attend_current;
  OptionalTensor key_padding_mask, cu_seqlens_q, cu_seqlens_k;
};
struct Results {
  Tensor o, remainder, residual, first_tiles;
};
struct ForwardArgs {
  Inputs inputs;
  Options options;
  std::optional<double> stick_epsilon;
  bool for_backward;
};
struct BackwardArgs {
  Tensor grad_o;
  OptionalTensor grad_remainder;
  Inputs inputs;
  Results results;
  Options options;
};

// Whether o loses digits on its way out, which backward then reads from the residual.
bool is_rounded(const Tensor& q) {
  return q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
}

void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  check_int32_vector(kOp, name, cu_seqlens, "q", q);
  MFX_CHECK_ARG(cu_seqlens.sym_size(0) >= 1, kOp, name, "have sequences + 1 elements", "none");
}

void check_arguments(const Inputs& inputs, const Options& options, std::optional<double> epsilon) {
  const auto& [q, k, v] = inputs;
  const auto& [scale, attend_current, key_padding_mask, cu_seqlens_q, cu_seqlens_k] = options;
  const bool packed = cu_seqlens_q.has_value();
  check_float_dtype(kOp, "q", q);
  if (packed) {
    MFX_CHECK_ARG(q.dim() == 3 || q.dim() == 4, kOp, "q", "be [total, H_q, D] or [total, H_kv, G, D] with cu_seqlens_q",
                  "shape ", q.sym_sizes());
    MFX_CHECK_ARG(k.dim() == 3, kOp, "k", "be [total, H_kv, D] with cu_seqlens_q", "shape ", k.sym_sizes());
  } else {
    MFX_CHECK_ARG(q.dim() == 4 || q.dim() == 5, kOp, "q", "be [B, T_q, H_q, D] or [B, T_q, H_kv, G, D]", "shape ",
                  q.sym_sizes());
    MFX_CHECK_ARG(k.dim() == 4, kOp, "k", "be [B, T_k, H_kv, D]", "shape ", k.sym_sizes());
  }
  check_same_dtype(kOp, "k", k, "q", q);
  check_same_device(kOp, "k", k, "q", q);
  check_head_dim(kOp, "q", q);
  MFX_CHECK_ARG(k.sym_size(-1) == q.sym_size(-1), kOp, "k", c10::str("have q's head dim (", q.sym_size(-1), ")"),
                k.sym_size(-1));
  check_heads(kOp, q, is_grouped(q, packed), "k", k);
  MFX_CHECK_ARG(q.sym_size(-2) >= 1, kOp, "q", "have at least one head per K/V head", "shape ", q.sym_sizes());
  if (!packed) {
    MFX_CHECK_ARG(q.sym_size(0) == k.sym_size(0), kOp, "k", c10::str("have q's batch size (", q.sym_size(0), ")"),
                  k.sym_size(0));
    MFX_CHECK_ARG(q.sym_size(1) <= k.sym_size(1), kOp, "q",
                  c10::str("not have more positions than k (", k.sym_size(1), ")"), q.sym_size(1));
  }
  if (v.has_value()) {
    check_same_dtype(kOp, "v", *v, "q", q);
    check_same_device(kOp, "v", *v, "q", q);
    MFX_CHECK_ARG(v->sym_sizes() == k.sym_sizes(), kOp, "v", c10::str("have k's shape ", k.sym_sizes()), "shape ",
                  v->sym_sizes());
  }
  check_scale(kOp, scale);
  check_stick_epsilon(kOp, epsilon);
  if (key_padding_mask.has_value()) {
    MFX_CHECK_ARG(!packed, kOp, "key_padding_mask", "be None where cu_seqlens_q is given", "both");
    check_key_padding_mask(kOp, *key_padding_mask, k, "T_k");
  }
  if (packed) check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, q);
  if (cu_seqlens_k.has_value()) {
    MFX_CHECK_ARG(packed, kOp, "cu_seqlens_k", "come with cu_seqlens_q", "cu_seqlens_q=None");
    check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, q);
    MFX_CHECK_ARG(cu_seqlens_k->sym_size(0) == cu_seqlens_q->sym_size(0), kOp, "cu_seqlens_k",
                  c10::str("have cu_seqlens_q's length (", cu_seqlens_q->sym_size(0), ")"), cu_seqlens_k->sym_size(0));
  } else if (packed) {
    MFX_CHECK_ARG(q.sym_size(0) == k.sym_size(0), kOp, "cu_seqlens_k", "be given where q and k have different lengths",
                  "None");
  }
}

Outputs allocate(const Tensor& q, bool for_backward) {
  const auto rows = q.sym_sizes().slice(0, q.dim() - 1);
  return {empty_in_order_of(q), at::empty_symint(rows, q.options().dtype(result_type(q))),
          for_backward && is_rounded(q) ? empty_in_order_of(q) : no_tensor(q),
          at::empty_symint(rows, q.options().dtype(at::kInt))};
}

// Holds the tensors that a problem's pointers point into.
struct Problem {
  Tensor q, k, v, mask, cu_q, cu_k;
  StickAttentionProblem params;

  Problem(const Inputs& inputs, const Options& options, Backend backend)
      : q(with_contiguous_heads(inputs.q)),
        k(with_contiguous_heads(inputs.k)),
        v(inputs.v.has_value() ? with_contiguous_heads(*inputs.v) : k) {
    const auto& [scale, attend_current, key_padding_mask, cu_seqlens_q, cu_seqlens_k] = options;
    const bool packed = cu_seqlens_q.has_value();
    if (key_padding_mask.has_value()) mask = key_padding_mask->contiguous();
    if (packed) cu_q = cu_seqlens_q->contiguous();
    if (packed) cu_k = cu_seqlens_k.has_value() ? cu_seqlens_k->contiguous() : cu_q;
    const int64_t heads = k.size(-2);
    const int64_t group = is_grouped(q, packed) ? q.size(-2) : q.size(-2) / heads;
    const DType dtype = check_float_dtype(kOp, "q", q);
    params = {
        .dtype = dtype,
        .sequences = packed ? cu_q.size(0) - 1 : q.size(0),
        .tokens_q = q.size(packed ? 0 : 1),
        .tokens_k = k.size(packed ? 0 : 1),
        .heads = heads,
        .group = group,
        .head_dim = q.size(-1),
        .q = q.const_data_ptr(),
        .k = k.const_data_ptr(),
        .v = v.const_data_ptr(),
        .k_is_v = is_same_memory(k, v),
        .q_strides = query_strides(q, group, packed),
        .k_strides = key_strides(k, packed),
        .v_strides = key_strides(v, packed),
        .key_padding_mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
        .cu_seqlens_q = packed ? cu_q.const_data_ptr<int32_t>() : nullptr,
        .cu_seqlens_k = packed ? cu_k.const_data_ptr<int32_t>() : nullptr,
        .scale = scale_or_default(scale, q),
        .attend_current = attend_current,
        .allow_tf32 = allow_tf32(backend, dtype),
    };
  }
};

// ---- Forward ----

template <bool kMeta>
Outputs forward(const ForwardArgs& a) {
  const auto& [inputs, options, stick_epsilon, for_backward] = a;
  check_arguments(inputs, options, stick_epsilon);
  if constexpr (kMeta) return allocate(with_contiguous_heads(inputs.q), for_backward);
  const Backend backend = backend_of(kOp, "q", inputs.q);
  const Problem problem(inputs, options, backend);
  const bool packed = options.cu_seqlens_q.has_value();
  Outputs outputs = allocate(problem.q, for_backward);
  auto& [o, remainder, residual, first_tiles] = outputs;
  const StickAttentionForwardParams params = {
      .problem = problem.params,
      .stick_epsilon = stick_epsilon_or_default(stick_epsilon, problem.q),
      .o = o.mutable_data_ptr(),
      .o_strides = query_strides(o, problem.params.group, packed),
      .residual = residual.numel() == 0 ? nullptr : residual.mutable_data_ptr(),
      .remainder = remainder.mutable_data_ptr(),
      .first_tiles = first_tiles.mutable_data_ptr<int32_t>(),
  };
  launch(kOp, backend, {problem.q, problem.k, problem.v}, params, stick_attention_forward_cpu,
         MFX_CUDA_FUNCTION(mfx_stick_attention_forward_cuda));
  return outputs;
}

// ---- Backward ----

void check_backward_arguments(const BackwardArgs& a) {
  const auto& [grad_o, grad_remainder, inputs, results, options] = a;
  check_arguments(inputs, options, std::nullopt);
  const Tensor& q = inputs.q;
  const auto rows = q.sym_sizes().slice(0, q.dim() - 1);
  const auto check = [&](const char* name, const Tensor& tensor, at::SymIntArrayRef shape, at::ScalarType dtype) {
    check_tensor(kOp, name, tensor, shape, dtype, "q", q);
  };
  check("grad_o", grad_o, q.sym_sizes(), q.scalar_type());
  check("o", results.o, q.sym_sizes(), q.scalar_type());
  check("residual", results.residual, is_rounded(q) ? q.sym_sizes() : c10::SymIntArrayRef{0}, q.scalar_type());
  check("remainder", results.remainder, rows, result_type(q));
  check("first_tiles", results.first_tiles, rows, at::kInt);
  if (grad_remainder.has_value()) check("grad_remainder", *grad_remainder, rows, result_type(q));
}

Grads allocate_grads(const Tensor& q, const Tensor& k, const OptionalTensor& v) {
  return {empty_in_order_of(q), empty_in_order_of(k),
          v.has_value() ? empty_in_order_of(with_contiguous_heads(*v)) : no_tensor(k)};
}

template <bool kMeta>
Grads backward(const BackwardArgs& a) {
  check_backward_arguments(a);
  const auto& [grad_o, grad_remainder, inputs, results, options] = a;
  const auto& [q, k, v] = inputs;
  const auto& [o, remainder, residual, first_tiles] = results;
  if constexpr (kMeta) return allocate_grads(with_contiguous_heads(q), with_contiguous_heads(k), v);
  const Backend backend = backend_of(kOp, "q", q);
  const Problem problem(inputs, options, backend);
  const bool packed = options.cu_seqlens_q.has_value();
  const int64_t group = problem.params.group;
  // The kernels read both in o's strides.
  const bool alike = !is_rounded(q) || residual.strides() == o.strides();
  const Tensor output = alike ? with_contiguous_heads(o) : o.contiguous();
  const Tensor rounding = alike ? with_contiguous_heads(residual) : residual.contiguous();
  const Tensor grad_output = with_contiguous_heads(grad_o);
  const Tensor sticks = remainder.contiguous(), tiles_visited = first_tiles.contiguous();
  const Tensor grad_sticks = grad_remainder.has_value() ? grad_remainder->contiguous() : Tensor();
  Grads grads = allocate_grads(problem.q, problem.k, v);
  auto& [grad_q, grad_k, grad_v] = grads;
  const StickAttentionBackwardParams params = {
      .problem = problem.params,
      .grad_o = grad_output.const_data_ptr(),
      .grad_o_strides = query_strides(grad_output, group, packed),
      .grad_remainder = grad_sticks.defined() ? grad_sticks.const_data_ptr() : nullptr,
      .o = output.const_data_ptr(),
      .residual = is_rounded(q) ? rounding.const_data_ptr() : nullptr,
      .o_strides = query_strides(output, group, packed),
      .remainder = sticks.const_data_ptr(),
      .first_tiles = tiles_visited.const_data_ptr<int32_t>(),
      .grad_q = grad_q.mutable_data_ptr(),
      .grad_q_strides = query_strides(grad_q, group, packed),
      .grad_k = grad_k.mutable_data_ptr(),
      .grad_k_strides = key_strides(grad_k, packed),
      .grad_v = v.has_value() ? grad_v.mutable_data_ptr() : nullptr,
      .grad_v_strides = v.has_value() ? key_strides(grad_v, packed) : StickKeyStrides{},
  };
  launch(kOp, backend, {problem.q, problem.k, problem.v}, params, stick_attention_backward_cpu,
         MFX_CUDA_FUNCTION(mfx_stick_attention_backward_cuda),
         MFX_CUDA_FUNCTION(mfx_stick_attention_backward_cuda_workspace));
  return grads;
}

// ---- Autograd and autocast ----

Outputs call_forward(const ForwardArgs& a) {
  return call<"stick_attention_forward", &forward<false>>(a);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct StickAttention : torch::autograd::Function<StickAttention> {
  static variable_list forward(AutogradContext* ctx, at::TensorList /*inputs*/, const ForwardArgs& a) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [o, remainder, residual, first_tiles] =
        call_forward({a.inputs, a.options, a.stick_epsilon, /*for_backward=*/true});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({residual, first_tiles});
    save_args(ctx, a.inputs, a.options, Results{o, remainder, residual, first_tiles});
    return {o, remainder, residual, first_tiles};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [inputs, options, results] = saved_args<Inputs, Options, Results>(ctx);
    const auto qkv = tensor_list(inputs.q, inputs.k, inputs.v);
    if (!grads[0].defined() && !grads[1].defined()) return gradients_of_defined(qkv, variable_list(3));
    const auto [grad_q, grad_k, grad_v] = call<"stick_attention_backward", &mfx::backward<false>>(
        {grads[0].defined() ? grads[0] : at::zeros_like(results.o), if_defined(grads[1]), inputs, results, options});
    return gradients_of_defined(qkv, {grad_q, grad_k, grad_v});
  }
};

Outputs forward_autograd(const ForwardArgs& a) {
  const auto& [q, k, v] = a.inputs;
  refuse_forward_mode(kOp, q, k, v);
  if (!records_grad(q, k, v)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(a);
  }
  const auto out = apply<StickAttention>(tensor_list(q, k, v), a);
  return {out[0], out[1], out[2], out[3]};
}

// q, k, v in the autocast type; the sticks are float32 whatever that is.
Outputs forward_autocast(ForwardArgs a) {
  auto& [q, k, v] = a.inputs;
  const Autocast cast(q);
  cast(q);
  cast(k);
  cast(v);
  return call_forward(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  const std::string inputs = "Tensor q, Tensor k, Tensor? v, ";
  const std::string options =
      "float? scale, bool attend_current, Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k";
  const std::string results = "Tensor o, Tensor remainder, Tensor residual, Tensor first_tiles";
  Definition(m, "stick_attention_forward(" + inputs + options + ", float? stick_epsilon, bool for_backward) -> (" +
                    results + ")")
      .kernel<&forward<false>>({CPU, CUDA})
      .kernel<&forward<true>>({Meta})
      .kernel<&forward_autograd>({Autograd})
      .kernel<&forward_autocast>({AutocastCPU, AutocastCUDA});
  Definition(m, "stick_attention_backward(Tensor grad_o, Tensor? grad_remainder, " + inputs + results + ", " + options +
                    ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)")
      .kernel<&backward<false>>({CPU, CUDA})
      .kernel<&backward<true>>({Meta})
      .kernel(Autograd, not_differentiable());
}

}  // namespace mfx
