#include "moduleformer_ext/stick_attention_decode.hpp"

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "bindings/attention.hpp"
#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "stick_attention_decode";
using Outputs = std::tuple<at::Tensor, at::Tensor>;

struct Args {
  at::Tensor q, k_cache;
  OptionalTensor v_cache;
  at::Tensor cache_lengths;
  std::optional<double> scale;
  bool attend_current;
  OptionalTensor key_padding_mask;
  std::optional<double> stick_epsilon;
};

void check_cache(const char* name, const at::Tensor& cache, const at::Tensor& q) {
  check_dim(kOp, name, cache, 4);
  check_same_dtype(kOp, name, cache, "q", q);
  check_same_device(kOp, name, cache, "q", q);
  MFX_CHECK_ARG(cache.sym_size(0) == q.sym_size(0), kOp, name, c10::str("have q's batch size ", q.sym_size(0)),
                "shape ", cache.sym_sizes());
  MFX_CHECK_ARG(cache.sym_size(3) == q.sym_size(-1), kOp, name, c10::str("have q's head dimension ", q.sym_size(-1)),
                "shape ", cache.sym_sizes());
  MFX_CHECK_ARG(cache.sym_stride(3) == 1, kOp, name, "be contiguous in its last dimension", "strides ",
                cache.sym_strides());
}

void check_arguments(const Args& a) {
  const auto& [q, k_cache, v_cache, cache_lengths, scale, attend_current, key_padding_mask, stick_epsilon] = a;
  MFX_CHECK_ARG(q.dim() == 4 || q.dim() == 5, kOp, "q", "be [B, T, H_q, D] or [B, T, H_kv, G, D]", "shape ",
                q.sym_sizes());
  check_float_dtype(kOp, "q", q);
  check_head_dim(kOp, "q", q);
  MFX_CHECK_ARG(q.sym_stride(-1) == 1, kOp, "q", "be contiguous in its last dimension", "strides ", q.sym_strides());

  check_cache("k_cache", k_cache, q);
  if (v_cache) {
    check_cache("v_cache", *v_cache, q);
    MFX_CHECK_ARG(v_cache->sym_sizes() == k_cache.sym_sizes(), kOp, "v_cache",
                  c10::str("have k_cache's shape ", k_cache.sym_sizes()), "shape ", v_cache->sym_sizes());
  }
  check_heads(kOp, q, is_grouped(q), "k_cache", k_cache);
  check_int32_vector(kOp, "cache_lengths", cache_lengths, "q", q);
  MFX_CHECK_ARG(cache_lengths.sym_size(0) == q.sym_size(0), kOp, "cache_lengths",
                c10::str("hold one length for each of q's ", q.sym_size(0), " sequences"), cache_lengths.sym_size(0));
  if (key_padding_mask) check_key_padding_mask(kOp, *key_padding_mask, k_cache, "S_max");
  check_scale(kOp, scale);
  check_stick_epsilon(kOp, stick_epsilon);
}

Outputs allocate(const at::Tensor& q) {
  return {empty_in_order_of(q),
          at::empty_symint(q.sym_sizes().slice(0, q.dim() - 1), q.options().dtype(result_type(q)))};
}

template <bool kMeta>
Outputs decode(const Args& a) {
  const auto& [q, k_cache, v_cache, cache_lengths, scale, attend_current, key_padding_mask, stick_epsilon] = a;
  check_arguments(a);
  if constexpr (kMeta) return allocate(q);
  const Backend backend = backend_of(kOp, "q", q);
  const at::Tensor lengths = cache_lengths.contiguous();
  Outputs outputs = allocate(q);
  auto& [out, remainder] = outputs;
  const int64_t kv_heads = k_cache.size(2);
  const int64_t group_size = is_grouped(q) ? q.size(3) : q.size(2) / kv_heads;
  const at::Tensor& v = v_cache ? *v_cache : k_cache;
  const StickAttentionDecodeParams params = {
      .dtype = check_float_dtype(kOp, "q", q),
      .q = q.const_data_ptr(),
      .q_strides = query_strides(q, group_size),
      .k_cache = k_cache.const_data_ptr(),
      .k_strides = key_strides(k_cache),
      .v_cache = v.const_data_ptr(),
      .v_strides = key_strides(v),
      .k_is_v = is_same_memory(k_cache, v),
      .lengths = lengths.const_data_ptr<int32_t>(),
      .key_padding_mask = key_padding_mask ? key_padding_mask->const_data_ptr<bool>() : nullptr,
      .mask_batch_stride = key_padding_mask ? key_padding_mask->stride(0) : 0,
      .mask_key_stride = key_padding_mask ? key_padding_mask->stride(1) : 0,
      .out = out.mutable_data_ptr(),
      .out_strides = query_strides(out, group_size),
      .remainder = remainder.mutable_data_ptr(),
      .batch = q.size(0),
      .num_new = q.size(1),
      .num_kv_heads = kv_heads,
      .group_size = group_size,
      .max_keys = k_cache.size(1),
      .head_dim = q.size(-1),
      .scale = scale_or_default(scale, q),
      .stick_epsilon = stick_epsilon_or_default(stick_epsilon, q),
      .attend_current = attend_current,
  };
  launch(kOp, backend, {q, k_cache}, params, stick_attention_decode_cpu,
         MFX_CUDA_FUNCTION(mfx_stick_attention_decode_cuda),
         MFX_CUDA_FUNCTION(mfx_stick_attention_decode_cuda_workspace));
  return outputs;
}

Outputs redispatch(const Args& a) {
  return call<"stick_attention_decode", &decode<false>>(a);
}

Outputs autograd(const Args& a) {
  const RefuseGradient refuse{kOp, "stick_attention"};
  refuse("q", a.q);
  refuse("k_cache", a.k_cache);
  refuse("v_cache", a.v_cache);
  const at::AutoDispatchBelowADInplaceOrView below;
  return redispatch(a);
}

// The cache decides: converting the few queries costs nothing, converting the cache would be a copy of it.
Outputs autocast(Args a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  a.q = a.q.to(a.k_cache.scalar_type());
  return redispatch(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  Definition(m,
             "stick_attention_decode(Tensor q, Tensor k_cache, Tensor? v_cache, Tensor cache_lengths, float? "
             "scale=None, bool attend_current=True, Tensor? key_padding_mask=None, float? stick_epsilon=None) -> "
             "(Tensor out, Tensor remainder)")
      .kernel<&decode<false>>({CPU, CUDA})
      .kernel<&decode<true>>({Meta})
      .kernel<&autograd>({Autograd})
      .kernel<&autocast>({AutocastCPU, AutocastCUDA});
}

}  // namespace mfx
