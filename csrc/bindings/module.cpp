// The Python module moduleformer_ext._C. Loading it registers the ops (torch.ops.moduleformer_ext.*, one file per op
// beside this one). The module has each of them as a function, too, which spares eager callers the look-ups of
// torch.ops, and tells how it was built.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <string>

#include "bindings/cuda_library.hpp"
#include "bindings/launch.hpp"
#include "core/brgemm.hpp"
#include "core/isa.hpp"
#include "core/parallel.hpp"

namespace py = pybind11;

namespace mfx {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MFX_VERSION;
  info["torch_version"] = MFX_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["build_type"] = MFX_BUILD_TYPE;
  info["sanitize"] = MFX_SANITIZE;
  info["cpu_isas"] = MFX_ISA_LIST;
  info["cpu_isa"] = isa_name(active_isa());
  info["brgemm_f32"] = brgemm_available_f32();
  info["brgemm_bf16"] = brgemm_available_bf16();
  std::string slow = slow_in_torch(DType::kBFloat16) ? "bfloat16 " : "";
  if (slow_in_torch(DType::kFloat16)) slow += "float16";
  info["slow_in_torch"] = slow;
  info["threads"] = num_threads();
  info["cuda"] = cuda_build_info();
  info["cuda_dispatch"] = cuda_serves_cpu() ? "CPU" : "CUDA";
  return info;
}

py::list kernels() {
  py::list rows;
  for (const CudaKernel& kernel : cuda_kernels()) rows.append(py::make_tuple(kernel.op, kernel.name, kernel.arch));
  return rows;
}

// Arguments and defaults are the schema's, gradients and autocast as with torch.ops: both enter the dispatcher.
void define_ops(py::module_& m) {
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.getNamespace() != "moduleformer_ext") continue;
    const auto overloads = torch::jit::getAllOperatorsFor(c10::Symbol::fromQualString(name.name));
    const std::string stem = name.name.substr(name.name.find("::") + 2);
    const std::string schema = c10::str(overloads.at(0)->schema());
    m.def(
        stem.c_str(),
        [overloads](const py::args& args, const py::kwargs& kwargs) {
          return torch::jit::invokeOperatorFromPython(overloads, args, kwargs);
        },
        schema.c_str());
  }
}

}  // namespace
}  // namespace mfx

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of moduleformer_ext; use moduleformer_ext.ops.";
  m.attr("torch_version") = MFX_TORCH_VERSION;
  m.def("build_info", &mfx::build_info, "How this extension was built and what it runs with, as a dict.");
  m.def("cuda_kernels", &mfx::kernels, "The compiled CUDA kernels: (op, name, first architecture) each.");
  mfx::define_ops(m);
}
