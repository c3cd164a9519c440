#include "core/isa.hpp"
#include "moduleformer_ext/stick_attention.hpp"

MFX_ISA_DECLARE(void stick_attention_forward(const StickAttentionForwardParams&))
MFX_ISA_DECLARE(void stick_attention_backward(const StickAttentionBackwardParams&))

namespace mfx {
namespace {

void forward(const StickAttentionForwardParams& params) {
  MFX_ISA_RETURN(stick_attention_forward, params)
}

void backward(const StickAttentionBackwardParams& params){MFX_ISA_RETURN(stick_attention_backward, params)}

// Nothing but an ascent from 0 to `total` may be followed into memory.
Status check_lengths(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t total, const char* message) {
  for (std::int64_t i = 0; i <= sequences; ++i) {
    const bool fits = i == 0 ? cu_seqlens[i] == 0 : cu_seqlens[i] >= cu_seqlens[i - 1];
    if (!fits || (i == sequences && cu_seqlens[i] != total)) {
      return {.message = message, .got = cu_seqlens[i], .index = i};
    }
  }
  return {};
}

Status check_sequences(const StickAttentionProblem& p) {
  if (p.cu_seqlens_q == nullptr) return {};
  const std::int32_t *q = p.cu_seqlens_q, *k = p.cu_seqlens_k;
  Status status = check_lengths(q, p.sequences, p.tokens_q, "cu_seqlens_q must ascend from 0 to the length of q");
  if (!status.ok()) return status;
  status = check_lengths(k, p.sequences, p.tokens_k, "cu_seqlens_k must ascend from 0 to the length of k");
  if (!status.ok()) return status;
  for (std::int64_t i = 0; i < p.sequences; ++i) {
    if (q[i + 1] - q[i] > k[i + 1] - k[i]) {
      return {.message = "cu_seqlens_q must give no sequence more queries than cu_seqlens_k gives it keys",
              .got = q[i + 1] - q[i],
              .index = i};
    }
  }
  return {};
}

// There are fewer tiles than keys. A wrong number in that range gives a wrong gradient, and no more.
Status check_first_tiles(const StickAttentionBackwardParams& params) {
  const StickAttentionProblem& p = params.problem;
  const std::int64_t rows = (p.cu_seqlens_q == nullptr ? p.sequences : 1) * p.tokens_q * p.heads * p.group;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int32_t tile = params.first_tiles[i];
    if (tile < 0 || tile > p.tokens_k) {
      return {.message = "first_tiles must be what the forward pass returned", .got = tile, .index = i};
    }
  }
  return {};
}

}  // namespace

Status stick_attention_forward_cpu(const StickAttentionForwardParams& params) {
  const Status status = check_sequences(params.problem);
  if (status.ok()) forward(params);
  return status;
}

Status stick_attention_backward_cpu(const StickAttentionBackwardParams& params) {
  Status status = check_sequences(params.problem);
  if (status.ok()) status = check_first_tiles(params);
  if (status.ok()) backward(params);
  return status;
}

}  // namespace mfx
