// What `moduleformer-ext info` says about the CUDA library. Touches no GPU.
#include <cuda_runtime_api.h>

#include "core/kernel_list.hpp"

#ifndef MFX_SM90_STATUS
#define MFX_SM90_STATUS "no sm_90a kernels"
#endif
#define MFX_STRING_(x) #x
#define MFX_STRING(x) MFX_STRING_(x)

extern "C" __attribute__((visibility("default"))) const char* mfx_cuda_build_info() {
  return "CUDA " MFX_STRING(CUDART_VERSION) ", architectures " MFX_CUDA_ARCHS ", " MFX_SM90_STATUS;
}

extern "C" __attribute__((visibility("default"))) void mfx_cuda_list_kernels(mfx::KernelSink sink, void* context) {
  mfx::KernelList::for_each(sink, context);
}
