// Conversions between binary32 and the storage types. PTX ISA, "Data movement and conversion instructions: cvt".
// A pair of 16-bit numbers is one register, the first in the lower half.
#pragma once

#include <cstdint>

#include "moduleformer_ext/common.hpp"

namespace mfx::device {

template <typename T>
__device__ std::uint32_t pack_pair(float low, float high);  // rounds to nearest even

template <>
__device__ inline std::uint32_t pack_pair<BFloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ inline std::uint32_t pack_pair<Float16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(BFloat16 x) {
  return __uint_as_float(std::uint32_t{x.bits} << 16);
}
__device__ inline float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <typename T>
__device__ inline float low_of_pair(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair)});
}
template <>
__device__ inline float low_of_pair<BFloat16>(std::uint32_t pair) {  // "Logic and shift instructions: shl"
  float y;
  asm("shl.b32 %0, %1, 16;" : "=f"(y) : "r"(pair));
  return y;
}

template <typename T>
__device__ inline float high_of_pair(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}
template <>
__device__ inline float high_of_pair<BFloat16>(std::uint32_t pair) {  // "Logic and shift instructions: and"
  float y;
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(y) : "r"(pair));
  return y;
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// To the nearest number of 11 significant bits, ties away from zero, as a binary32 register.
__device__ inline std::uint32_t to_tf32(float x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace mfx::device
