// The status of the kernels launched so far, for CUDA launchers. Waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "moduleformer_ext/common.hpp"

namespace mfx {

inline Status cuda_status() {
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace mfx
