#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "core/cuda_launch.hpp"

namespace mfx {

Status failure(const std::string& text) {
  static thread_local std::string message;
  message = text;
  return {message.c_str()};
}

namespace {

constexpr int kSharedByDefault = 48 << 10;

std::string kernel_name(const void* function) {
  const char* symbol = nullptr;
  if (call_runtime([&] { return cudaFuncGetName(&symbol, function); }) != cudaSuccess || symbol == nullptr) {
    return "a kernel";
  }
  char* const readable = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
  std::string name = readable != nullptr ? readable : symbol;
  std::free(readable);
  name.resize(std::min(name.find('('), name.size()));
  return name;
}

Status launch_failure(cudaError_t error, const void* function, dim3 grid, unsigned threads, int shared_bytes) {
  const std::string name = kernel_name(function);
  int available = 0;
  const Status known = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &available);
  if (known.ok() && shared_bytes > available) {
    return failure(name + " needs " + std::to_string((shared_bytes + 1023) / 1024) +
                   " KiB of shared memory per block, this GPU has " + std::to_string(available / 1024));
  }
  std::string text = name + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    return failure(text + " (this build is for the architectures " MFX_CUDA_ARCHS "; see docs/build.md)");
  }
  return failure(text + " (" + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks of " +
                 std::to_string(threads) + " threads)");
}

}  // namespace

Status refusal(const std::string& text) {
  Status status = failure(text);
  status.refused = true;
  return status;
}

Status device_attribute(cudaDeviceAttr attribute, int* value) {
  const cudaError_t error = call_runtime([&] {
    int device = 0;
    const cudaError_t none = cudaGetDevice(&device);
    return none != cudaSuccess ? none : cudaDeviceGetAttribute(value, attribute, device);
  });
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

Status compute_capability(int* value) {
  int major = 0, minor = 0;
  Status status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status.ok()) status = device_attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  *value = 10 * major + minor;
  return status;
}

Status launch_kernel(const void* function, dim3 grid, unsigned threads, int shared_bytes, Stream stream,
                     void** arguments) {
  const cudaError_t error = call_runtime([&] {
    if (shared_bytes > kSharedByDefault) {
      const cudaError_t refused =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      if (refused != cudaSuccess) return refused;
    }
    return cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  });
  return error == cudaSuccess ? Status{} : launch_failure(error, function, grid, threads, shared_bytes);
}

}  // namespace mfx
