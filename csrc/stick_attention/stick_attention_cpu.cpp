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

Status check_sequences(const StickAttentionProblem& p) {
  if (p.cu_seqlens_q == nullptr) return {};
  const std::int32_t *q = p.cu_seqlens_q, *k = p.cu_seqlens_k;
  const std::int64_t n = p.sequences;
  if (q[0] != 0 || q[n] != p.tokens_q) return {"stick_attention: cu_seqlens_q must go from 0 to the length of q"};
  if (k[0] != 0 || k[n] != p.tokens_k) return {"stick_attention: cu_seqlens_k must go from 0 to the length of k"};
  for (std::int64_t i = 0; i < n; ++i) {
    if (q[i + 1] < q[i]) return {"stick_attention: cu_seqlens_q must ascend"};
    if (k[i + 1] < k[i]) return {"stick_attention: cu_seqlens_k must ascend"};
    if (q[i + 1] - q[i] > k[i + 1] - k[i]) {
      return {"stick_attention: no packed sequence must have more queries (cu_seqlens_q) than keys (cu_seqlens_k)"};
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
  const Status status = check_sequences(params.problem);
  if (status.ok()) backward(params);
  return status;
}

}  // namespace mfx
