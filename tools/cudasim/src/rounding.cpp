// Operations with a directed rounding mode. Compiled with -frounding-math.
#include "rounding.h"

#include <cfenv>
#include <cmath>

namespace cudasim {
namespace {
struct Mode {
  int old;
  explicit Mode(Round r) : old(fegetround()) {
    fesetround(r == Round::Zero   ? FE_TOWARDZERO
               : r == Round::Up   ? FE_UPWARD
               : r == Round::Down ? FE_DOWNWARD
                                  : FE_TONEAREST);
  }
  ~Mode() { fesetround(old); }
};
template <class T>
T apply(int op, volatile T a, volatile T b, volatile T c) {
  volatile T r;
  switch (op) {
    case 0: r = a + b; break;
    case 1: r = a - b; break;
    case 2: r = a * b; break;
    case 3: r = a / b; break;
    case 4: r = std::fma(a, b, c); break;
    default: r = std::sqrt(a); break;
  }
  return r;
}
}  // namespace
float roundedF32(int op, Round m, float a, float b, float c) {
  Mode s(m);
  return apply<float>(op, a, b, c);
}
double roundedF64(int op, Round m, double a, double b, double c) {
  Mode s(m);
  return apply<double>(op, a, b, c);
}
float narrowRounded(double v, Round m) {
  Mode s(m);
  volatile double d = v;
  volatile float f = (float)d;
  return f;
}
float s64ToF32(long long v, Round m) {
  Mode s(m);
  volatile long long d = v;
  volatile float f = (float)d;
  return f;
}
float u64ToF32(unsigned long long v, Round m) {
  Mode s(m);
  volatile unsigned long long d = v;
  volatile float f = (float)d;
  return f;
}
double s64ToF64(long long v, Round m) {
  Mode s(m);
  volatile long long d = v;
  volatile double f = (double)d;
  return f;
}
double u64ToF64(unsigned long long v, Round m) {
  Mode s(m);
  volatile unsigned long long d = v;
  volatile double f = (double)d;
  return f;
}
}  // namespace cudasim
