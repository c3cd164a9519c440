// Types shared by every op's public C++ API. Torch-free; plain data only.
#pragma once

#include <cstdint>

namespace mfx {

// Storage of the two 16-bit float formats: bit patterns, layout-compatible with c10::BFloat16 and c10::Half.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// In bytes.
constexpr std::int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
    case DType::kBFloat16:
    case DType::kFloat16: break;
  }
  return 2;
}

// A CUDA stream as an opaque handle, so that host code needs no CUDA header.
using Stream = void*;

// What a launcher returns. `message` is null on success and otherwise a string that lasts until the thread's next
// launch: with `refused` it reads "<argument> must ..., got ...", and one about an element of a tensor comes with that
// element and its index. `slow`, a static string, says of a success why a much slower kernel was taken than the op has.
struct [[nodiscard]] Status {
  const char* message = nullptr;
  const char* slow = nullptr;
  bool refused = false;
  std::int64_t got = 0, index = -1;
  bool ok() const { return message == nullptr; }
};

// Takes one compiled CUDA kernel: its op, its name, and its architecture (80: sm_80 and newer, 90: sm_90a alone).
// Exported by the CUDA library: void mfx_cuda_list_kernels(KernelSink sink, void* context).
using KernelSink = void (*)(void* context, const char* op, const char* name, int arch);

}  // namespace mfx
