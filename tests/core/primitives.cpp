// What of csrc/core is compiled once for all instruction sets, as C functions for test_primitives.py.
#include <cstdint>
#include <cstring>

#include "core/brgemm.hpp"
#include "core/float16.hpp"
#include "core/isa.hpp"

#define MFX_EXPORT extern "C" __attribute__((visibility("default")))

using mfx::BFloat16;
using mfx::Float16;

// Whether kernels for this instruction set were compiled in and can run here.
MFX_EXPORT int isa_usable(const char* name) {
  for (int i = 0; i <= static_cast<int>(mfx::Isa::kAvx512Bf16); ++i) {
    const auto isa = static_cast<mfx::Isa>(i);
    if (std::strcmp(mfx::isa_name(isa), name) == 0) return mfx::isa_usable(isa);
  }
  return 0;
}

MFX_EXPORT int brgemm_usable_bf16() {
  return mfx::brgemm_available_bf16();
}

MFX_EXPORT void widen_bf16_scalar(const BFloat16* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = mfx::to_float(in[i]);
}
MFX_EXPORT void widen_f16_scalar(const Float16* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = mfx::to_float(in[i]);
}
MFX_EXPORT void narrow_bf16_scalar(const float* in, BFloat16* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = mfx::from_float<BFloat16>(in[i]);
}
MFX_EXPORT void narrow_f16_scalar(const float* in, Float16* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = mfx::from_float<Float16>(in[i]);
}
