// Which instruction set the CPU kernels run with, decided once per process.
#pragma once

namespace mfx {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// Whether it was compiled in and this processor has it.
bool isa_usable(Isa isa);

// The best usable one; MFX_CPU_ISA=baseline|avx2|avx512|avx512_bf16 lowers it (for tests). A name that is unknown or
// not usable here throws std::invalid_argument.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace mfx

// One X(namespace, Isa) for each instruction set compiled in besides the baseline (cmake/MfxIsa.cmake).
#if defined(MFX_HAVE_AVX2)
#define MFX_FOR_AVX2(X, ...) X(avx2, kAvx2, __VA_ARGS__)
#else
#define MFX_FOR_AVX2(X, ...)
#endif
#if defined(MFX_HAVE_AVX512)
#define MFX_FOR_AVX512(X, ...) X(avx512, kAvx512, __VA_ARGS__)
#else
#define MFX_FOR_AVX512(X, ...)
#endif
#if defined(MFX_HAVE_AVX512_BF16)
#define MFX_FOR_AVX512_BF16(X, ...) X(avx512_bf16, kAvx512Bf16, __VA_ARGS__)
#else
#define MFX_FOR_AVX512_BF16(X, ...)
#endif
#define MFX_FOR_EACH_ISA(X, ...) \
  MFX_FOR_AVX2(X, __VA_ARGS__) MFX_FOR_AVX512(X, __VA_ARGS__) MFX_FOR_AVX512_BF16(X, __VA_ARGS__)

// At global scope: declares a function in the namespace of every instruction set, for example
// MFX_ISA_DECLARE(Status stick_attention(const StickAttentionParams&));
#define MFX_ISA_DECLARE_IN(name_space, isa, ...) \
  namespace mfx::name_space {                    \
  __VA_ARGS__;                                   \
  }
#define MFX_ISA_DECLARE(...)                   \
  MFX_ISA_DECLARE_IN(baseline, _, __VA_ARGS__) \
  MFX_FOR_EACH_ISA(MFX_ISA_DECLARE_IN, __VA_ARGS__)

// As the last statement of a function: returns function(arguments...) of the active instruction set's namespace.
#define MFX_ISA_CASE(name_space, isa, function, ...) \
  case ::mfx::Isa::isa: return ::mfx::name_space::function(__VA_ARGS__);
#define MFX_ISA_RETURN(function, ...)                       \
  switch (::mfx::active_isa()) {                            \
    MFX_FOR_EACH_ISA(MFX_ISA_CASE, function, __VA_ARGS__)   \
    default: return ::mfx::baseline::function(__VA_ARGS__); \
  }
