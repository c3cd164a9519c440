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

// A CUDA stream as an opaque handle, so that host code needs no CUDA header.
using Stream = void*;

// What a launcher returns. `message` is null on success and a static string otherwise.
struct [[nodiscard]] Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

}  // namespace mfx
