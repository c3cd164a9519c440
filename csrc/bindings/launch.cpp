#include "bindings/launch.hpp"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <sstream>

#include "bindings/checks.hpp"

namespace mfx {

// The only file that knows MFX_CUDA_DISPATCH.
bool cuda_serves_cpu() {
  return MFX_CUDA_SERVES_CPU;
}

Backend backend_of(const char* op, const char* argument, const at::Tensor& tensor) {
  if (tensor.is_cpu() && !cuda_serves_cpu()) return Backend::kCpu;
  MFX_CHECK_ARG(tensor.is_cpu() || tensor.is_cuda(), op, argument, "be a CPU or CUDA tensor", "one on ",
                tensor.device());
  MFX_CHECK_ARG(tensor.scalar_type() != at::kDouble, op, argument,
                "be float32, bfloat16 or float16 for the CUDA kernels (only the CPU has kernels for float64)",
                tensor.scalar_type());
  return Backend::kCuda;
}

void check_cpu(const char* op, const char* argument, const at::Tensor& tensor) {
  MFX_CHECK_ARG(tensor.is_cpu() && !cuda_serves_cpu(), op, argument,
                "be a CPU tensor (this op has no CUDA kernels in this build)", "one on ", tensor.device());
}

Stream current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void check_launch(const char* op, const Status& status, at::TensorList inputs) {
  if (status.ok()) return;
  std::ostringstream shapes;
  for (const at::Tensor& input : inputs) {
    if (input.defined()) shapes << ' ' << input.sizes();
  }
  TORCH_CHECK(false, op, ": the CUDA kernels failed: ", status.message, " (inputs of shapes", shapes.str(), ")");
}

}  // namespace mfx
