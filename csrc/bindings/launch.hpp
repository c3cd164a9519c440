// Which kernels serve a tensor, and how the CUDA ones are launched; README.md here shows the pattern.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <concepts>

#include "bindings/checks.hpp"
#include "bindings/cuda_library.hpp"
#include "moduleformer_ext/common.hpp"

namespace mfx {

enum class Backend { kCpu, kCuda };

// The kernels for an op's tensors, told by one of them. Raises for a dtype or device that no kernel serves.
Backend backend_of(const char* op, const char* argument, const at::Tensor& tensor);

// For ops that have CPU kernels alone.
void check_cpu(const char* op, const char* argument, const at::Tensor& tensor);

// Whether these kernels may round the operands of float32 products to TF32: what torch.backends.cuda.matmul's
// fp32_precision, or allow_tf32 before it, says. Asked of float32 on CUDA alone.
bool allow_tf32(Backend backend, DType dtype);

// Whether the CUDA kernels serve CPU tensors: on the emulated device, which the environment asks for
// (MFX_CUDA_DISPATCH=CPU).
bool cuda_serves_cpu();

// The current stream of a device; null for the CPU.
Stream current_stream(c10::Device device);

// Raises what kernels have found wrong since the last launch. Waits for nothing.
void check_earlier_launches();

// Turns a failure to launch into an exception with the shapes of the op's inputs (undefined ones are left out). A much
// slower kernel than the op has makes a warning, once per op and reason; an exception where MFX_STRICT=1.
void check_launch(const char* op, const Status& status, at::TensorList inputs);

// Params that have a member `workspace` get memory of as many bytes as their workspace function says.
template <typename Params>
concept HasWorkspace = requires(Params params) {
  { params.workspace } -> std::convertible_to<void*>;
};

// Runs the kernels of a backend: on the CPU `cpu`, otherwise the function that `cuda` names (MFX_CUDA_FUNCTION), on the
// device and current stream of inputs[0]; workspace_bytes names the one that says how much workspace it needs.
template <typename Params, typename... Workspace>
  requires(HasWorkspace<Params> == (sizeof...(Workspace) == 1))
void launch(const char* op, Backend backend, at::TensorList inputs, Params params, Status (*cpu)(const Params&),
            auto cuda, Workspace... workspace_bytes) {
  if (backend == Backend::kCpu) return check_status(op, cpu(params));
  check_earlier_launches();
  const c10::Device device = inputs[0].device();
  const c10::DeviceGuard guard(device);
  at::Tensor workspace;  // freed when this returns: the allocator hands the memory out again in the order of the stream
  if constexpr (HasWorkspace<Params>) {
    workspace = at::empty({workspace_bytes()(params)...}, inputs[0].options().dtype(at::kByte));
    params.workspace = workspace.mutable_data_ptr();
  }
  check_launch(op, cuda()(params, current_stream(device)), inputs);
}

}  // namespace mfx
