// stick_attention: causal attention whose weights break a stick instead of normalising a softmax.
//
//   beta_ij = sigmoid(scale * q_i . k_j),  A_ij = beta_ij * prod_{j < m <= i} (1 - beta_im),  o_i = sum_j A_ij v_j,
//   remainder_i = prod_j (1 - beta_ij),
//
// with query i at position tokens_k - tokens_q + i, over keys up to its own position (attend_current) or before it.
// csrc/stick_attention/README.md describes the evaluation.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

// Element strides; the head dimension is contiguous. A packed batch has batch stride 0.
struct StickQueryStrides {
  std::int64_t batch, token, head, group;
};
struct StickKeyStrides {
  std::int64_t batch, token, head;
};

// What forward and backward share.
struct StickAttentionProblem {
  DType dtype;
  std::int64_t sequences;           // B, or the number of packed sequences
  std::int64_t tokens_q, tokens_k;  // per sequence; in total when packed
  std::int64_t heads;               // K/V heads H
  std::int64_t group;               // query heads per K/V head G
  std::int64_t head_dim;            // D, a multiple of 8 in [8, 1024]
  const void* q;                    // [B, Tq, H, G, D]
  const void* k;                    // [B, Tk, H, D]
  const void* v;                    // [B, Tk, H, D]
  bool k_is_v;                      // v holds k's elements at k's addresses: to be read once
  StickQueryStrides q_strides;
  StickKeyStrides k_strides, v_strides;
  const bool* key_padding_mask;      // [B, Tk] contiguous, true keeps; null keeps all
  const std::int32_t* cu_seqlens_q;  // [sequences + 1], null when not packed
  const std::int32_t* cu_seqlens_k;
  double scale;
  bool attend_current;
  bool allow_tf32 = false;  // CUDA, float32: products in tf32
};

struct StickAttentionForwardParams {
  StickAttentionProblem problem;
  double stick_epsilon;  // the walk to older keys stops when every remainder of a tile is <= this; 0 never stops
  void* o;               // [B, Tq, H, G, D], as q
  StickQueryStrides o_strides;
  void* residual;             // what rounding took from o, in the same strides; null where not wanted
  void* remainder;            // [B, Tq, H, G] contiguous, float (double for double)
  std::int32_t* first_tiles;  // [B, Tq, H, G] contiguous, the oldest key tile that was visited
};

struct StickAttentionBackwardParams {
  StickAttentionProblem problem;
  const void* grad_o;
  StickQueryStrides grad_o_strides;
  const void* grad_remainder;  // [B, Tq, H, G] contiguous, float (double for double); null is zero
  const void* o;
  const void* residual;  // null where o was not rounded
  StickQueryStrides o_strides;
  const void* remainder;
  const std::int32_t* first_tiles;
  void* grad_q;
  StickQueryStrides grad_q_strides;
  void* grad_k;  // where grad_v is null, the gradient of both
  StickKeyStrides grad_k_strides;
  void* grad_v;  // null where v was not given as an input of its own, which implies k_is_v
  StickKeyStrides grad_v_strides;
  void* workspace = nullptr;  // CUDA: mfx_stick_attention_backward_cuda_workspace() bytes, aligned to 16
};

// Error, before anything is written, when cu_seqlens do not ascend from 0 to the totals, a sequence has more queries
// than keys, or first_tiles cannot be forward's.
Status stick_attention_forward_cpu(const StickAttentionForwardParams& params);
Status stick_attention_backward_cpu(const StickAttentionBackwardParams& params);

// In libmoduleformer_ext_cuda. cu_seqlens and first_tiles are trusted: they are read on the device only. first_tiles
// counts other tiles than on the CPU.
extern "C" Status mfx_stick_attention_forward_cuda(const StickAttentionForwardParams& params, Stream stream);
extern "C" Status mfx_stick_attention_backward_cuda(const StickAttentionBackwardParams& params, Stream stream);
extern "C" std::int64_t mfx_stick_attention_backward_cuda_workspace(const StickAttentionBackwardParams& params);

}  // namespace mfx
