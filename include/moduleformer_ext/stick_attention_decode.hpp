// stick_attention_decode: a few new queries against a preallocated key/value cache.
//
// Query t of sequence b stands at position p = lengths[b] - num_new + t and sees the keys j <= p (attend_current) or
// j < p: o = sum_j A_j v_j with A_j = beta_j * prod_{j < m <= p} (1 - beta_m), beta_j = sigmoid(scale * q . k_j), and
// the remainder r = prod_m (1 - beta_m). The cache is read from the newest key backwards, and no further than where
// every query's r has fallen to stick_epsilon; entries at or beyond lengths[b] are never read.
#pragma once

#include "moduleformer_ext/stick_attention.hpp"

namespace mfx {

struct StickAttentionDecodeParams {
  DType dtype;  // of q, k_cache, v_cache and out

  const void* q;  // [batch, num_new, num_kv_heads, group_size, head_dim], last dimension contiguous
  StickQueryStrides q_strides;

  const void* k_cache;  // [batch, max_keys, num_kv_heads, head_dim], last dimension contiguous
  StickKeyStrides k_strides;
  const void* v_cache;  // like k_cache
  StickKeyStrides v_strides;
  bool k_is_v;  // v_cache holds k_cache's elements at k_cache's addresses: to be read once

  const std::int32_t* lengths;                      // [batch], keys in the cache, the new ones included
  const bool* key_padding_mask;                     // [batch, max_keys], true = keep; null: keep all
  std::int64_t mask_batch_stride, mask_key_stride;  // in elements, like the others

  void* out;  // like q
  StickQueryStrides out_strides;
  void* remainder;  // [batch, num_new, num_kv_heads, group_size] contiguous, float (double for float64)

  std::int64_t batch, num_new, num_kv_heads, group_size, max_keys, head_dim;
  double scale;
  double stick_epsilon;  // 0: every key is read
  bool attend_current;

  void* workspace = nullptr;  // CUDA only: as many bytes as mfx_stick_attention_decode_cuda_workspace says
};

// Returns an error, with nothing written, when a length is outside [0, max_keys].
Status stick_attention_decode_cpu(const StickAttentionDecodeParams& params);

// In the CUDA library. Lengths stay on the device: one outside [0, max_keys] is taken as the nearest that is not.
extern "C" {
Status mfx_stick_attention_decode_cuda(const StickAttentionDecodeParams& params, Stream stream);
std::int64_t mfx_stick_attention_decode_cuda_workspace(const StickAttentionDecodeParams& params);
}

}  // namespace mfx
