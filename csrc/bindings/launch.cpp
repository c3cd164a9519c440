#include "bindings/launch.hpp"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>

#include "bindings/checks.hpp"
#include "moduleformer_ext/expert_layout.hpp"

namespace mfx {
namespace {

bool strict() {
  static const bool set = [] {
    const char* value = std::getenv("MFX_STRICT");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return set;
}

bool is_new(const char* op, const char* reason) {
  static std::mutex mutex;
  static std::set<std::pair<std::string_view, std::string_view>> known;  // of static strings
  const std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(op, reason).second;
}

std::string shapes_of(at::TensorList inputs) {
  std::ostringstream shapes;
  for (const at::Tensor& input : inputs) {
    if (input.defined()) shapes << ' ' << input.sizes();
  }
  return shapes.str();
}

}  // namespace

bool cuda_serves_cpu() {
  static const bool serves = [] {
    const char* value = std::getenv("MFX_CUDA_DISPATCH");
    if (value == nullptr || std::string_view(value) == "CUDA") return false;
    TORCH_CHECK_VALUE(std::string_view(value) == "CPU", "MFX_CUDA_DISPATCH must be CUDA or CPU, got ", value);
    // A GPU cannot reach the memory of CPU tensors.
    TORCH_CHECK_VALUE(dlsym(RTLD_DEFAULT, "cudasim_register") != nullptr,
                      "MFX_CUDA_DISPATCH=CPU needs the emulated device, and this process runs without it");
    return true;
  }();
  return serves;
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

bool allow_tf32(Backend backend, DType dtype) {
  // Context::allowTF32CuBLAS() raises where fp32_precision was set and allow_tf32 was not; this answers for both.
  return backend == Backend::kCuda && dtype == DType::kFloat32 &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

Stream current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void check_earlier_launches() {
  const std::int64_t id = MFX_CUDA_FUNCTION(mfx_expert_layout_cuda_take_bad_id)()();
  MFX_CHECK_ARG(
      id == 0, "expert_layout", "expert_ids", "lie in [0, num_experts)", id,
      " (found on the GPU by an earlier call, whose layout has these slots with the first or the last expert)");
}

void check_launch(const char* op, const Status& status, at::TensorList inputs) {
  if (status.ok() && status.slow == nullptr) return;
  const std::string inputs_text = " (inputs of shapes" + shapes_of(inputs) + ")";
  TORCH_CHECK_VALUE(!status.refused, op, ": ", status.message, inputs_text);
  TORCH_CHECK(status.ok(), op, ": the CUDA kernels failed: ", status.message, inputs_text);
  TORCH_CHECK(!strict(), op, ": no fast CUDA kernel serves this: ", status.slow, inputs_text,
              "; MFX_STRICT=1 makes this an error");
  if (is_new(op, status.slow)) {
    TORCH_WARN(op, ": a slow CUDA kernel serves this: ", status.slow, inputs_text,
               ". Said once; MFX_STRICT=1 makes it an error.");
  }
}

}  // namespace mfx
