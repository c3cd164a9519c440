#include "core/isa.hpp"
#include "moduleformer_ext/route_topk.hpp"

MFX_ISA_DECLARE(Status route_topk(const RouteTopKParams&));
MFX_ISA_DECLARE(Status route_topk_backward(const RouteTopKBackwardParams&));

namespace mfx {
namespace {

// The kernels follow them into memory.
Status check_ids(const RouteTopKBackwardParams& params) {
  for (std::int64_t i = 0; i < params.network.num_tokens * params.k; ++i) {
    const std::int32_t id = params.expert_ids[i];
    if (id < 0 || id >= params.network.num_experts) {
      return {.message = "expert_ids must lie in [0, E)", .got = id, .index = i};
    }
  }
  return {};
}

Status run_backward(const RouteTopKBackwardParams& params) {
  MFX_ISA_RETURN(route_topk_backward, params);
}

}  // namespace

Status route_topk_cpu(const RouteTopKParams& params) {
  MFX_ISA_RETURN(route_topk, params);
}

Status route_topk_backward_cpu(const RouteTopKBackwardParams& params) {
  const Status status = check_ids(params);
  return status.ok() ? run_backward(params) : status;
}

}  // namespace mfx
