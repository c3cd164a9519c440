#include "core/isa.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mfx {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512Bf16: return processor_has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return processor_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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
