// How CUDA launchers call the runtime. The error of a call of ours is the op's to report: it does not stay behind as
// the runtime's last error, where the next op would find it, and an error that others left there is not taken away.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <type_traits>

#include "core/divide.hpp"
#include "moduleformer_ext/common.hpp"

namespace mfx {

// What went wrong while launching.
Status failure(const std::string& text);

// For what the kernels do not serve: "<argument> must ..., got ...".
Status refusal(const std::string& text);

// What `call` returns.
template <typename Call>
cudaError_t call_runtime(Call call) {
  const bool clean = cudaPeekAtLastError() == cudaSuccess;
  const cudaError_t error = call();
  if (error != cudaSuccess && clean) cudaGetLastError();
  return error;
}

Status device_attribute(cudaDeviceAttr attribute, int* value);

// 10 times the current device's.
Status compute_capability(int* value);

// The kernel at `function`; a refusal names it, and what it needs beside what there is.
Status launch_kernel(const void* function, dim3 grid, unsigned threads, int shared_bytes, Stream stream,
                     void** arguments);

template <typename... Params>
Status launch(void (*kernel)(Params...), dim3 grid, unsigned threads, int shared_bytes, Stream stream,
              const std::common_type_t<Params>&... params) {
  void* arguments[] = {const_cast<std::common_type_t<Params>*>(&params)...};
  return launch_kernel(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, stream, arguments);
}

}  // namespace mfx
