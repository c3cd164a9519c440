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
template <class To, class From>
To convert(volatile From v, Round m) {
  Mode s(m);
  volatile To r = (To)v;
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
  return convert<float>(v, m);
}
float s64ToF32(long long v, Round m) {
  return convert<float>(v, m);
}
float u64ToF32(unsigned long long v, Round m) {
  return convert<float>(v, m);
}
double s64ToF64(long long v, Round m) {
  return convert<double>(v, m);
}
double u64ToF64(unsigned long long v, Round m) {
  return convert<double>(v, m);
}
}  // namespace cudasim
