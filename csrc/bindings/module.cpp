// The Python module moduleformer_ext._C. Loading it registers the ops (torch.ops.moduleformer_ext.*, one file per op
// beside this one); the module itself tells how it was built.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "core/brgemm.hpp"
#include "core/isa.hpp"
#include "core/parallel.hpp"

namespace py = pybind11;

namespace mfx {
namespace {

// The CUDA library lies beside this module where nvcc was there to build it. Loading it touches no GPU.
py::object cuda_build() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&cuda_build), &self) == 0) return py::none();
  std::string path = self.dli_fname;
  path = path.substr(0, path.find_last_of('/') + 1) + "libmoduleformer_ext_cuda.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return py::none();
  using BuildInfo = const char* (*)();
  const auto info = reinterpret_cast<BuildInfo>(dlsym(library, "mfx_cuda_build_info"));
  return info == nullptr ? py::object(py::none()) : py::object(py::str(info()));
}

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
  info["threads"] = num_threads();
  info["cuda"] = cuda_build();
  return info;
}

}  // namespace
}  // namespace mfx

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of moduleformer_ext; use moduleformer_ext.ops.";
  m.attr("torch_version") = MFX_TORCH_VERSION;
  m.def("build_info", &mfx::build_info, "How this extension was built and what it runs with, as a dict.");
}
