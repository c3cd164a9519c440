// Special-function unit results, relative errors around 2^-22. PTX ISA, "Floating point instructions". Subnormal inputs
// and results are zero (.ftz), which makes each one instruction; exp2f() is that under -ftz=true alone.
#pragma once

#include <cstdint>

namespace mfx::device {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x where one of the bits of `mask` is set in `bits`, else 0. Two instructions of the machine, of which PTX makes three
// from `bits & mask ? x : 0`. PTX ISA, "Logic and shift instructions: lop3"; 0xc0 is a & b.
template <std::uint32_t kMask>
__device__ inline float where_set(std::uint32_t bits, float x) {
  float y;
  asm("{ .reg .pred set;\n"
      "lop3.or.b32 _|set, %1, %2, 0, 0xc0, 0;\n"
      "selp.f32 %0, %3, 0f00000000, set; }"
      : "=f"(y)
      : "r"(bits), "n"(kMask), "f"(x));
  return y;
}

// NaN where one operand is NaN, unlike fminf(). CUDA has this for 16-bit types alone.
__device__ inline float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ inline float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace mfx::device
