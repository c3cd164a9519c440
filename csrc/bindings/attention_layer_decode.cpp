#include <ATen/ops/arange.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/linear.h>

#include <cstring>
#include <optional>

#include "bindings/attention.hpp"
#include "bindings/attention_layer_decode.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/linear_decode.hpp"
#include "bindings/op.hpp"
#include "bindings/routed.hpp"
#include "moduleformer_ext/stick_attention_decode.hpp"

namespace mfx {
namespace {

using Args = AttentionLayerDecode::Args;

void check_projections(const char* op, const Args& a, const c10::SymInt& width) {
  const at::Tensor& x = a.input.x();
  const auto& [k_weight, k_bias, v_weight, v_bias] = a.project;
  MFX_CHECK_ARG(k_weight.has_value() == v_weight.has_value(), op, "v_weight", "be given if and only if k_weight is",
                v_weight.has_value() ? "one" : "none");
  MFX_CHECK_ARG(k_weight.has_value() == a.cache.v_cache.has_value(), op, "v_cache",
                "be given if and only if k_weight is", a.cache.v_cache.has_value() ? "one" : "none");
  const auto check = [&](const char* weight_name, const OptionalTensor& weight, const char* bias_name,
                         const OptionalTensor& bias) {
    if (!weight) {
      MFX_CHECK_ARG(!bias, op, bias_name, c10::str("be None without ", weight_name), "one");
      return;
    }
    check_linear(op, x, weight_name, *weight, bias_name, bias);
    MFX_CHECK_ARG(weight->sym_size(0) == width, op, weight_name,
                  c10::str("have ", width, " rows, the features of all of k_cache's heads"), "shape ",
                  weight->sym_sizes());
  };
  check("k_weight", k_weight, "k_bias", k_bias);
  check("v_weight", v_weight, "v_bias", v_bias);
  MFX_CHECK_ARG(k_weight || x.sym_size(2) == width, op, "k_weight",
                c10::str("be given where x has other features than all of k_cache's heads (", width, ")"), "none");
}

}  // namespace

void AttentionLayerDecode::check(const char* op, const Args& a) {
  a.input.check(op);
  const at::Tensor& x = a.input.x();
  const auto& [k_cache, v_cache, lengths] = a.cache;
  const auto batch = x.sym_size(0);
  check_dim(op, "k_cache", k_cache, 4);
  check_same_dtype(op, "k_cache", k_cache, "x", x);
  check_same_device(op, "k_cache", k_cache, "x", x);
  MFX_CHECK_ARG(k_cache.sym_size(0) == batch, op, "k_cache", c10::str("have x's batch size ", batch), "shape ",
                k_cache.sym_sizes());
  MFX_CHECK_ARG(k_cache.sym_size(2) >= 1, op, "k_cache", "have at least one head", "shape ", k_cache.sym_sizes());
  check_head_dim(op, "k_cache", k_cache);
  MFX_CHECK_ARG(k_cache.sym_stride(3) == 1, op, "k_cache", "be contiguous in its last dimension", "strides ",
                k_cache.sym_strides());
  if (v_cache) {
    check_tensor(op, "v_cache", *v_cache, k_cache.sym_sizes(), x.scalar_type(), "x", x);
    MFX_CHECK_ARG(v_cache->sym_stride(3) == 1, op, "v_cache", "be contiguous in its last dimension", "strides ",
                  v_cache->sym_strides());
  }
  check_int32_vector(op, "cache_lengths", lengths, "x", x);
  MFX_CHECK_ARG(lengths.sym_size(0) == batch && lengths.is_contiguous(), op, "cache_lengths",
                c10::str("be contiguous and hold one length for each of x's ", batch, " sequences"), "shape ",
                lengths.sym_sizes(), " of strides ", lengths.sym_strides());
  if (a.key_padding_mask) check_key_padding_mask(op, *a.key_padding_mask, k_cache, "S_max");
  check_stick_epsilon(op, a.stick_epsilon);

  const c10::SymInt width = k_cache.sym_size(2) * k_cache.sym_size(3), features = x.sym_size(2);
  const c10::SymInt experts = a.input.network.num_experts();
  check_projections(op, a, width);
  const auto check_experts = [&](const char* name, const ExpertWeight& weight, const c10::SymInt& in,
                                 const c10::SymInt& out) {
    weight.check(op, name, experts, x);
    const ExpertShape shape = weight.shape();
    MFX_CHECK_ARG(shape.in == in && shape.out == out, op, name,
                  c10::str("have shape [num_experts, ", in, ", ", out, "] beside x and k_cache"),
                  "shape [num_experts, ", shape.in, ", ", shape.out, "]");
  };
  check_experts("query_weight", a.query_weight, features, width);
  check_experts("output_weight", a.output_weight, width, features);
}

void AttentionLayerDecode::check_runnable(const char* op, const Args& a) {
  a.query_weight.check_runnable(op, "query_weight", a.input.x());
  a.output_weight.check_runnable(op, "output_weight", a.input.x());
  if (backend_of(op, "x", a.input.x()) != Backend::kCpu) return;  // lengths stay on the device
  const int64_t room = a.cache.k_cache.size(1), added = a.input.x().size(1);
  const int32_t* const lengths = a.cache.cache_lengths.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < a.cache.k_cache.size(0); ++b) {
    TORCH_CHECK_VALUE(lengths[b] >= 0 && lengths[b] <= room - added, op, ": cache_lengths must leave room for ", added,
                      " tokens in k_cache's ", room, ", got ", lengths[b], " at index ", b);
  }
}

void AttentionLayerDecode::refuse_gradients(const Args& a, const RefuseGradient& refuse) {
  a.input.refuse_gradients(refuse);
  refuse("query_weight", a.query_weight.tensors);
  refuse("output_weight", a.output_weight.tensors);
  refuse("k_weight", a.project.k_weight);
  refuse("k_bias", a.project.k_bias);
  refuse("v_weight", a.project.v_weight);
  refuse("v_bias", a.project.v_bias);
  refuse("k_cache", a.cache.k_cache);
  refuse("v_cache", a.cache.v_cache);
}

namespace {

// The new tokens' keys or values.
at::Tensor project(const char* op, Backend backend, const at::Tensor& tokens, const OptionalTensor& weight,
                   const OptionalTensor& bias) {
  if (!weight) return tokens;
  return backend == Backend::kCpu ? linear_of_few(op, tokens, *weight, bias) : at::linear(tokens, *weight, bias);
}

// Writes rows [B, T, H * D_h] behind the lengths of the CPU's caches.
void append_cpu(const at::Tensor& cache, const int32_t* lengths, const at::Tensor& rows) {
  const int64_t element = static_cast<int64_t>(cache.element_size()), head_bytes = cache.size(3) * element;
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* const to = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t b = 0; b < cache.size(0); ++b) {
    for (int64_t t = lengths[b]; t < lengths[b] + rows.size(1); ++t) {
      for (int64_t h = 0; h < cache.size(2); ++h, from += head_bytes) {
        std::memcpy(to + (b * cache.stride(0) + t * cache.stride(1) + h * cache.stride(2)) * element, from, head_bytes);
      }
    }
  }
}

// Appends the new tokens to the cache and moves its lengths.
void append(Backend backend, const Cache& cache, const at::Tensor& k, const at::Tensor& v) {
  const auto& [k_cache, v_cache, cache_lengths] = cache;
  const int64_t batch = k_cache.size(0), room = k_cache.size(1), added = k.size(1);
  if (backend == Backend::kCpu) {
    int32_t* const lengths = cache_lengths.mutable_data_ptr<int32_t>();
    append_cpu(k_cache, lengths, k);
    if (v_cache) append_cpu(*v_cache, lengths, v);
    for (int64_t b = 0; b < batch; ++b) lengths[b] += static_cast<int32_t>(added);
    return;
  }
  // Tokens that do not fit overwrite the last place.
  const auto indices = cache_lengths.options().dtype(at::kLong);
  const at::Tensor rows = at::arange(batch, indices).unsqueeze(1);
  const at::Tensor places = (cache_lengths.unsqueeze(1) + at::arange(added, indices)).clamp_max_(room - 1);
  const auto write = [&](at::Tensor to, const at::Tensor& values) {
    to.index_put_({rows, places}, values.view({batch, added, to.size(2), to.size(3)}));
  };
  write(k_cache, k);
  if (v_cache) write(*v_cache, v);
  at::Tensor(cache_lengths).add_(added);
}

struct Buffers {
  Routing routing;
  void *q, *attended, *remainder;

  Buffers(Workspace& memory, const Args& a, const std::vector<at::Tensor>& route_results)
      : routing(memory, a.input, route_results) {
    const at::Tensor& k_cache = a.cache.k_cache;
    const int64_t heads = k_cache.size(2), queries = a.input.num_tokens().expect_int() * a.input.k;
    const int64_t bytes = queries * heads * k_cache.size(3) * static_cast<int64_t>(k_cache.element_size());
    q = memory.take<char>(bytes);
    attended = memory.take<char>(bytes);
    remainder = memory.take<char>(queries * heads * static_cast<int64_t>(c10::elementSize(result_type(k_cache))));
  }
};

// The k queries of a token are k query heads over each key head.
void attend(const char* op, Backend backend, const Args& a, const Buffers& buffers) {
  const at::Tensor& x = a.input.x();
  const at::Tensor& k_cache = a.cache.k_cache;
  const at::Tensor& v_cache = a.cache.v_cache ? *a.cache.v_cache : k_cache;
  const int64_t tokens = x.size(1), heads = k_cache.size(2), dim = k_cache.size(3), width = heads * dim;
  const StickQueryStrides strides = {tokens * a.input.k * width, a.input.k * width, dim, width};
  const StickAttentionDecodeParams params = {
      .dtype = check_float_dtype(op, "x", x),
      .q = buffers.q,
      .q_strides = strides,
      .k_cache = k_cache.const_data_ptr(),
      .k_strides = key_strides(k_cache),
      .v_cache = v_cache.const_data_ptr(),
      .v_strides = key_strides(v_cache),
      .k_is_v = is_same_memory(k_cache, v_cache),
      .lengths = a.cache.cache_lengths.const_data_ptr<int32_t>(),
      .key_padding_mask = a.key_padding_mask ? a.key_padding_mask->const_data_ptr<bool>() : nullptr,
      .mask_batch_stride = a.key_padding_mask ? a.key_padding_mask->stride(0) : 0,
      .mask_key_stride = a.key_padding_mask ? a.key_padding_mask->stride(1) : 0,
      .out = buffers.attended,
      .out_strides = strides,
      .remainder = buffers.remainder,
      .batch = x.size(0),
      .num_new = tokens,
      .num_kv_heads = heads,
      .group_size = a.input.k,
      .max_keys = k_cache.size(1),
      .head_dim = dim,
      .scale = scale_or_default(std::nullopt, k_cache),
      .stick_epsilon = stick_epsilon_or_default(a.stick_epsilon, x),
      .attend_current = true,
  };
  launch(op, backend, {x, k_cache}, params, stick_attention_decode_cpu,
         MFX_CUDA_FUNCTION(mfx_stick_attention_decode_cuda),
         MFX_CUDA_FUNCTION(mfx_stick_attention_decode_cuda_workspace));
}

}  // namespace

void AttentionLayerDecode::decode(const char* op, const Args& a, LayerResults& results) {
  const at::Tensor& x = a.input.x();
  const Backend backend = backend_of(op, "x", x);
  check_runnable(op, a);
  const auto [buffers, memory] = buffers_beside<Buffers>(x, a, results.route);
  const int64_t features = x.size(2), width = a.cache.k_cache.size(2) * a.cache.k_cache.size(3);

  const at::Tensor tokens = a.input.normed();
  append(backend, a.cache, project(op, backend, tokens, a.project.k_weight, a.project.k_bias),
         project(op, backend, tokens, a.project.v_weight, a.project.v_bias));
  const RoutedLayout layout = route(op, backend, a.input, tokens, buffers.routing);
  multiply(op, backend, x, layout, a.query_weight,
           {{}, {tokens.const_data_ptr(), RowOrder::kToken, features, 0}, RowOrder::kSlot, nullptr, buffers.q});
  attend(op, backend, a, buffers);
  multiply(op, backend, x, layout, a.output_weight,
           {{},
            {buffers.attended, RowOrder::kSlot, a.input.k * width, width},
            RowOrder::kToken,
            buffers.routing.gates,
            results.y.mutable_data_ptr()});
  results.y.add_(x);
}

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  LayerDecode<AttentionLayerDecode>::define(
      m,
      "Tensor[] query_weight, int[] query_format, Tensor[] output_weight, int[] output_format, Tensor? k_weight, "
      "Tensor? k_bias, Tensor? v_weight, Tensor? "
      "v_bias, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor(c!) cache_lengths, Tensor? key_padding_mask, float? "
      "stick_epsilon");
}

}  // namespace mfx
