#include "core/isa.hpp"
#include "grouped_gemm/check_layout.hpp"
#include "moduleformer_ext/quantised_gemm.hpp"

MFX_ISA_DECLARE(void quantised_gemm(const QuantisedGemmParams&));

namespace mfx {
namespace {

void run(const QuantisedGemmParams& params) {
  MFX_ISA_RETURN(quantised_gemm, params);
}

}  // namespace

Status quantised_gemm_cpu(const QuantisedGemmParams& params) {
  const Status status = check_layout(params.layout);
  if (status.ok()) run(params);
  return status;
}

}  // namespace mfx
