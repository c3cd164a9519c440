// Errors of approximate instructions (CUDASIM_APPROX_ERROR). Bounds: PTX ISA, "Floating-Point Instructions" (rcp, sqrt,
// rsqrt, ex2, tanh, div) and "Half Precision Floating-Point Instructions"; CUDA C++ Programming Guide, "Mathematical
// Functions", intrinsics (lg2 as __log2f, sin and cos as __sinf and __cosf, within [-pi, pi]).
#include "approximate.h"

#include <cmath>

#include "machine.h"

namespace cudasim {
namespace {

// Uniform in [-1, 1].
double direction(Approximate what, uint64_t bits) {
  uint64_t x = bits * 0x9e3779b97f4a7c15ull ^ (config().seed + 1) * 0xd1b54a32d192ed03ull ^ (uint64_t)what << 56;
  for (int i = 0; i < 2; i++) {  // the finaliser of splitmix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
  }
  return (double)(int64_t)x * 0x1p-63;
}

double ulpOf(double x) {
  int e;
  std::frexp(x, &e);
  return std::ldexp(1., std::max(e - 24, -149));
}

// Absolute bound of the error, rounding included.
double bound(Approximate what, double exact, double operand) {
  const double size = std::fabs(exact), ulp = ulpOf(exact);
  switch (what) {
    case Approximate::Rcp: return ulp;
    case Approximate::Rsqrt: return size * 0x1p-22 * 0.536;  // 2^-22.9
    case Approximate::Sin: return std::fabs(operand) <= M_PI ? std::exp2(-21.41) : 0;
    case Approximate::Cos: return std::fabs(operand) <= M_PI ? std::exp2(-21.19) : 0;
    case Approximate::Lg2: return operand >= 0.5 && operand <= 2 ? 0x1p-22 : 2 * ulp;
    case Approximate::Ex2: return 2 * ulp;
    case Approximate::Tanh: return size * 0x1p-11;
    case Approximate::Sqrt: return size * 0x1p-23;
    case Approximate::Div: return 2 * ulp;
  }
  return 0;
}

// What the ISA's tables of special values give.
bool isExact(Approximate what, double exact) {
  if (exact == 0 || !std::isfinite(exact)) return true;
  return std::fabs(exact) == 1 && (what == Approximate::Ex2 || what == Approximate::Cos || what == Approximate::Tanh);
}

}  // namespace

float withinBinary32(Approximate what, double exact, double operand, uint64_t bits) {
  if (isExact(what, exact)) return (float)exact;
  const double room = std::max(0., bound(what, exact, operand) - ulpOf(exact) / 2);
  double y = exact + direction(what, bits) * room;
  if (what == Approximate::Tanh || what == Approximate::Sin || what == Approximate::Cos)
    y = std::fmin(std::fmax(y, -1.), 1.);
  return (float)y;
}

float withinHalf(Approximate what, bool bf16, double exact, uint64_t bits) {
  if (isExact(what, exact)) return (float)exact;
  const double size = std::fabs(exact);
  int e;
  std::frexp(exact, &e);
  const double rounding = std::ldexp(1., bf16 ? e - 9 : std::max(e - 12, -25));  // half a unit in the last place
  const double most = what == Approximate::Ex2 ? size * std::exp2(bf16 ? -7. : -9.9) : std::exp2(bf16 ? -8. : -10.987);
  double y = exact + direction(what, bits) * std::max(0., most - rounding);
  if (what == Approximate::Tanh) y = std::fmin(std::fmax(y, -1.), 1.);
  return (float)y;
}

}  // namespace cudasim
