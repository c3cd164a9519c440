// Entry points: the layout's contents are checked, then the active instruction set's kernels run.
#include "moduleformer_ext/grouped_gemm.hpp"

#include "core/isa.hpp"

MFX_ISA_DECLARE(void grouped_gemm(const GroupedGemmParams&));
MFX_ISA_DECLARE(void grouped_gemm_backward(const GroupedGemmBackwardParams&));
MFX_ISA_DECLARE(void expert_ffn(const ExpertFfnParams&));
MFX_ISA_DECLARE(void expert_ffn_backward(const ExpertFfnBackwardParams&));

namespace mfx {
namespace {

// Kernels follow these indices into memory, so a layout that is none must stop here. S comparisons: nothing beside
// the products.
Status check_layout(const RoutedLayout& layout) {
  const std::int64_t slots = layout.num_slots();
  const std::int32_t* const offsets = layout.offsets;
  for (std::int64_t e = 0; e <= layout.num_experts; ++e) {
    const bool fits = e == 0 ? offsets[e] == 0 : offsets[e] >= offsets[e - 1];
    if (!fits || (e == layout.num_experts && offsets[e] != slots)) {
      return {.message = "layout.offsets must ascend from 0 to the number of slots", .got = offsets[e], .index = e};
    }
  }
  for (std::int64_t p = 0; p < slots; ++p) {
    const std::int32_t slot = layout.slot_order[p];
    if (slot < 0 || slot >= slots || layout.position[slot] != p) {
      return {.message = "layout.slot_order must be a permutation of the slots and layout.position its inverse",
              .got = slot,
              .index = p};
    }
  }
  return {};
}

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
