#include "bindings/cuda_library.hpp"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <tuple>

#include "moduleformer_ext/common.hpp"

namespace mfx {
namespace {

namespace fs = std::filesystem;

fs::path library_path() {
  Dl_info self;
  TORCH_INTERNAL_ASSERT(dladdr(reinterpret_cast<void*>(&cuda_symbol), &self) != 0);
  return fs::path(self.dli_fname).parent_path() / "libmoduleformer_ext_cuda.so";
}

// Stays open: kernels may run until the process ends.
void* open_library(const fs::path& path) {
  return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
}

template <typename Function>
Function symbol_or_null(const char* name) {
  void* library = open_library(library_path());
  return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}

// Why the library was not opened: mostly because torch brings the CUDA runtime of another major version.
std::string why_not_opened() {
  std::string why = dlerror();
#ifdef MFX_NVCC_VERSION
  if (why.find("libcudart") != std::string::npos) {
    const at::CUDAHooksInterface& hooks = at::detail::getCUDAHooks();
    const long torch = hooks.hasCUDART() ? hooks.versionCUDART() : 0;  // 1000 major + 10 minor
    why +=
        "; they were compiled by nvcc " MFX_NVCC_VERSION " and need the CUDA runtime of that major version, and this ";
    why += torch == 0 ? "torch is built without CUDA"
                      : c10::str("torch is built for CUDA ", torch / 1000, ".", torch % 1000 / 10);
    why += ": build with the nvcc of torch's major version, see docs/build.md";
  }
#endif
  return why;
}

}  // namespace

void* cuda_symbol(const char* name) {
  static const fs::path path = library_path();
  TORCH_CHECK(fs::exists(path), "moduleformer_ext was built without CUDA kernels (there is no ", path.string(),
              "); build it where nvcc is on PATH, see docs/build.md");
  void* library = open_library(path);
  TORCH_CHECK(library != nullptr, "moduleformer_ext: the CUDA kernels cannot be loaded: ", why_not_opened());
  void* symbol = dlsym(library, name);
  TORCH_CHECK(symbol != nullptr, "moduleformer_ext: ", path.string(), " has no ", name,
              "; it comes from another build than this module, build both again");
  return symbol;
}

std::optional<std::string> cuda_build_info() {
  const auto info = symbol_or_null<const char* (*)()>("mfx_cuda_build_info");
  if (info == nullptr) return std::nullopt;
  return info();
}

std::vector<CudaKernel> cuda_kernels() {
  std::vector<CudaKernel> kernels;
  const auto list = symbol_or_null<void (*)(KernelSink, void*)>("mfx_cuda_list_kernels");
  if (list == nullptr) return kernels;
  list([](void* context, const char* op, const char* name,
          int arch) { static_cast<std::vector<CudaKernel>*>(context)->push_back({op, name, arch}); },
       &kernels);
  std::sort(kernels.begin(), kernels.end(), [](const CudaKernel& a, const CudaKernel& b) {
    return std::tie(a.op, a.arch, a.name) < std::tie(b.op, b.arch, b.name);
  });
  return kernels;
}

}  // namespace mfx
