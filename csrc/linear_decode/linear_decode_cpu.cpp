#include "moduleformer_ext/linear_decode.hpp"

#include "core/isa.hpp"

MFX_ISA_DECLARE(Status linear_decode(const LinearDecodeParams&));

namespace mfx {

Status linear_decode_cpu(const LinearDecodeParams& params) {
  MFX_ISA_RETURN(linear_decode, params);
}

}  // namespace mfx
