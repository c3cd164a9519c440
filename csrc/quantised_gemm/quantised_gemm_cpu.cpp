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
  if (params.dtype == DType::kFloat64) return {.message = "x must be float32, bfloat16 or float16"};
  if (params.weight.bits != 8 && params.weight.bits != 4) {
    return {.message = "weight.bits must be 8 or 4", .got = params.weight.bits, .index = 0};
  }
  const Status status = check_layout(params.layout);
  if (status.ok()) run(params);
  return status;
}

}  // namespace mfx
