// Entry points: the layout's contents are checked, then the active instruction set's kernels run.
#include "moduleformer_ext/grouped_gemm.hpp"

#include "core/isa.hpp"
#include "grouped_gemm/check_layout.hpp"

MFX_ISA_DECLARE(void grouped_gemm(const GroupedGemmParams&));
MFX_ISA_DECLARE(void grouped_gemm_backward(const GroupedGemmBackwardParams&));
MFX_ISA_DECLARE(void expert_ffn(const ExpertFfnParams&));
MFX_ISA_DECLARE(void expert_ffn_backward(const ExpertFfnBackwardParams&));

namespace mfx {
namespace {

void run_grouped_gemm(const GroupedGemmParams& params) {
  MFX_ISA_RETURN(grouped_gemm, params);
}
void run_grouped_gemm_backward(const GroupedGemmBackwardParams& params) {
  MFX_ISA_RETURN(grouped_gemm_backward, params);
}
void run_expert_ffn(const ExpertFfnParams& params) {
  MFX_ISA_RETURN(expert_ffn, params);
}
void run_expert_ffn_backward(const ExpertFfnBackwardParams& params) {
  MFX_ISA_RETURN(expert_ffn_backward, params);
}

}  // namespace

Status grouped_gemm_cpu(const GroupedGemmParams& params) {
  const Status status = check_layout(params.layout);
  if (status.ok()) run_grouped_gemm(params);
  return status;
}

Status grouped_gemm_backward_cpu(const GroupedGemmBackwardParams& params) {
  const Status status = check_layout(params.forward.layout);
  if (status.ok()) run_grouped_gemm_backward(params);
  return status;
}

Status expert_ffn_cpu(const ExpertFfnParams& params) {
  const Status status = check_layout(params.layout);
  if (status.ok()) run_expert_ffn(params);
  return status;
}

Status expert_ffn_backward_cpu(const ExpertFfnBackwardParams& params) {
  const Status status = check_layout(params.forward.layout);
  if (status.ok()) run_expert_ffn_backward(params);
  return status;
}

}  // namespace mfx
