#include "core/isa.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mfx {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
// Asked of the processor: not every compiler's __builtin_cpu_supports knows these by name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(/*leaf=*/1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
bool has_avx512_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(/*leaf=*/7, /*subleaf=*/0, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 11 & 1) != 0;
}
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(/*leaf=*/7, /*subleaf=*/1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512Bf16: return processor_has(Isa::kAvx512) && has_avx512_vnni() && has_avx512_bf16();
    case Isa::kAvx512:
      return processor_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    default: return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

Isa choose_isa() {
  const char* wanted = std::getenv("MFX_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (int i = static_cast<int>(Isa::kAvx512Bf16); i >= 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_usable(isa) && (any || std::strcmp(wanted, kNames[i]) == 0)) return isa;
  }
  throw std::invalid_argument(
      "moduleformer_ext: MFX_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, compiled in and within what this "
      "processor has, got '" +
      std::string(wanted) + "'");
}

}  // namespace

bool isa_usable(Isa isa) {
#define MFX_ISA_USABLE(name_space, name, ...) \
  if (isa == Isa::name) return processor_has(isa);
  MFX_FOR_EACH_ISA(MFX_ISA_USABLE, )
#undef MFX_ISA_USABLE
  return isa == Isa::kBaseline;
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

}  // namespace mfx
