#include "core/isa.hpp"
#include "moduleformer_ext/route_topk.hpp"

MFX_ISA_DECLARE(Status route_topk(const RouteTopKParams&));
MFX_ISA_DECLARE(Status route_topk_backward(const RouteTopKBackwardParams&));

namespace mfx {

Status route_topk_cpu(const RouteTopKParams& params) {
  MFX_ISA_RETURN(route_topk, params);
}

Status route_topk_backward_cpu(const RouteTopKBackwardParams& params) {
  MFX_ISA_RETURN(route_topk_backward, params);
}

}  // namespace mfx
