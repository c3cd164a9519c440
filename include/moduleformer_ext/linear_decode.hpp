// linear_decode: a dense projection of one or a few tokens, y = x W^T + b, as fast as W can be read.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

struct LinearDecodeParams {
  DType dtype;         // of all tensors
  const void* x;       // [num_rows, in], contiguous
  const void* weight;  // [out, in], contiguous
  const void* bias;    // [out]; may be null
  void* y;             // [num_rows, out], contiguous
  std::int64_t num_rows, in, out;
};

Status linear_decode_cpu(const LinearDecodeParams& params);

}  // namespace mfx
