// Four neighbouring columns of a row, the unit of everything that happens outside the main loop.
#pragma once

#include "ptx/convert.cuh"

namespace mfx::grouped {

inline constexpr int kVector = 4;

// `count` of four elements; all of them at an aligned address if kAligned, zeros for the others.
template <typename T, bool kAligned>
__device__ inline float4 load4(const void* from, int count) {
  const T* x = static_cast<const T*>(from);
  if constexpr (kAligned && sizeof(T) == 4) {
    return *static_cast<const float4*>(from);
  } else if constexpr (kAligned) {
    const uint2 pairs = *static_cast<const uint2*>(from);
    return {device::low_of_pair<T>(pairs.x), device::high_of_pair<T>(pairs.x), device::low_of_pair<T>(pairs.y),
            device::high_of_pair<T>(pairs.y)};
  } else {
    return {count > 0 ? device::to_float(x[0]) : 0.0f, count > 1 ? device::to_float(x[1]) : 0.0f,
            count > 2 ? device::to_float(x[2]) : 0.0f, count > 3 ? device::to_float(x[3]) : 0.0f};
  }
}

template <typename T, bool kAligned>
__device__ inline void store4(void* to, const float4& x, int count) {
  if constexpr (kAligned && sizeof(T) == 4) {
    *static_cast<float4*>(to) = x;
  } else if constexpr (kAligned) {
    *static_cast<uint2*>(to) = {device::pack_pair<T>(x.x, x.y), device::pack_pair<T>(x.z, x.w)};
  } else {
    T* y = static_cast<T*>(to);
    if (count > 0) y[0] = device::from_float<T>(x.x);
    if (count > 1) y[1] = device::from_float<T>(x.y);
    if (count > 2) y[2] = device::from_float<T>(x.z);
    if (count > 3) y[3] = device::from_float<T>(x.w);
  }
}

__device__ inline float4 operator*(const float4& a, const float4& b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ inline float4 operator*(float a, const float4& b) {
  return {a * b.x, a * b.y, a * b.z, a * b.w};
}
__device__ inline float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ inline float dot4(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

}  // namespace mfx::grouped
