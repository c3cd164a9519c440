// Conversions between binary32/binary64 and the narrow formats, written without
// branches on the hot paths so that lane loops vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace cudasim {

inline uint32_t bitsOf(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline uint64_t bitsOf(double f) {
  uint64_t u;
  memcpy(&u, &f, 8);
  return u;
}
inline float floatOf(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline double doubleOf(uint64_t u) {
  double f;
  memcpy(&f, &u, 8);
  return f;
}

inline float f16ToF32(uint16_t h) {
  uint32_t mag = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float f = floatOf(mag) * 0x1p112f;
  uint32_t u = bitsOf(f);
  u = mag >= 0x0f800000u ? (mag | 0x7f800000u) : u;  // inf and NaN
  return floatOf(u | sign);
}
inline uint16_t f32ToF16(float f) {  // round to nearest even; NaN becomes 0x7fff
  uint32_t b = bitsOf(f), sign = b >> 16 & 0x8000u, u = b & 0x7fffffffu;
  uint32_t normal = (u + 0xc8000fffu + (u >> 13 & 1)) >> 13;
  uint32_t sub = bitsOf(floatOf(u) + 0.5f) - 0x3f000000u;
  uint32_t r = u < 0x38800000u ? sub : normal;
  r = u >= 0x47800000u ? 0x7c00u : r;
  r |= sign;
  return (uint16_t)(u > 0x7f800000u ? 0x7fffu : r);
}
inline float bf16ToF32(uint16_t h) {
  return floatOf((uint32_t)h << 16);
}
inline uint16_t f32ToBf16(float f) {
  uint32_t u = bitsOf(f);
  uint32_t r = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : r);
}

// Round to odd keeps a later rounding to fewer bits correct.
inline double sumToOdd(double a, double b) {
  double s = a + b;
  if (!std::isfinite(s)) return s;
  double bb = s - a, err = (a - (s - bb)) + (b - bb);
  uint64_t u = bitsOf(s);
  if (err != 0 && !(u & 1)) u += (err > 0) == (s > 0) ? 1 : -1;
  return doubleOf(u);
}
inline float narrowToOdd(double d) {
  float f = (float)d;
  if (!std::isfinite(f)) {  // rounded up to infinity: the largest finite value is odd
    return std::isfinite(d) ? std::copysign(floatOf(0x7f7fffffu), f) : f;
  }
  uint32_t u = bitsOf(f);
  if ((double)f != d && !(u & 1)) {
    if (u << 1 == 0) return floatOf((std::signbit(d) ? 0x80000000u : 0) | 1);
    u += (std::fabs(d) > std::fabs((double)f)) ? 1 : -1;
  }
  return floatOf(u);
}

// e4m3 and e5m2 (PTX ISA, "Alternate Floating-Point Data Formats").
float e4m3ToF32(uint8_t v);
float e5m2ToF32(uint8_t v);
uint8_t f32ToE4m3(float f, bool satfinite);
uint8_t f32ToE5m2(float f, bool satfinite);

inline float flushF32(float f) {  // .ftz
  uint32_t u = bitsOf(f);
  return floatOf((u & 0x7f800000u) ? u : (u & 0x80000000u));
}
inline float saturateF32(float f) {
  return f > 0.0f ? (f < 1.0f ? f : 1.0f) : 0.0f;
}  // NaN -> +0

}  // namespace cudasim
