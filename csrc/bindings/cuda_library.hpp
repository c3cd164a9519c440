// The torch-free library of CUDA kernels beside _C. It is opened when a CUDA launcher is first needed, never on import.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace mfx {

// The address of an exported function. Raises where the library was not built, cannot be loaded or lacks the function.
void* cuda_symbol(const char* name);

// What the library says about its build; nothing where there is none.
std::optional<std::string> cuda_build_info();

struct CudaKernel {
  std::string op, name;
  int arch;  // 80: sm_80 and newer; 90: sm_90a alone
};

// The kernels of the library; none where there is no library.
std::vector<CudaKernel> cuda_kernels();

}  // namespace mfx

// A function of the CUDA library, with the type that its header declares: MFX_CUDA_FUNCTION(mfx_<op>_cuda)() is its
// address. The library is opened by this call and not before.
#define MFX_CUDA_FUNCTION(name)                                                              \
  [] {                                                                                       \
    static const auto function = reinterpret_cast<decltype(&name)>(mfx::cuda_symbol(#name)); \
    return function;                                                                         \
  }
