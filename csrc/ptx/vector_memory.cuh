// 128-bit accesses; addresses are aligned to 16 bytes. PTX ISA, "Data movement and conversion instructions: ld, st".
//
// Not *pointer and __ldg(): of shared memory these want 64-bit addresses, and of global memory ptxas schedules them
// worse (0.7 % more instructions in attention's forward kernels, 0.3 % in the router's).
#pragma once

#include "ptx/shared_address.cuh"

namespace mfx::device {

__device__ inline uint4 load_global_128(const void* from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

// For data that no kernel running at the same time writes.
__device__ inline uint4 load_global_128_constant(const void* from) {
  uint4 x;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}

__device__ inline void store_global_128(void* to, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// To a multiple of 8 bytes.
__device__ inline void store_global_64(float* to, float x, float y) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
}

template <int kOffset = 0>
__device__ inline uint4 load_shared_128(SharedAddress from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from), "n"(kOffset)
               : "memory");
  return x;
}

template <int kOffset = 0>
__device__ inline void store_shared_128(SharedAddress to, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w),
               "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline std::uint32_t load_shared_32(SharedAddress from) {
  std::uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(x) : "r"(from), "n"(kOffset) : "memory");
  return x;
}

template <int kOffset = 0>
__device__ inline void store_shared_32(SharedAddress to, std::uint32_t x) {
  asm volatile("st.shared.u32 [%0 + %2], %1;" ::"r"(to), "r"(x), "n"(kOffset) : "memory");
}

template <int kOffset = 0>
__device__ inline uint2 load_shared_64(SharedAddress from) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(x.x), "=r"(x.y) : "r"(from), "n"(kOffset) : "memory");
  return x;
}
template <int kOffset = 0>
__device__ inline void store_shared_64(SharedAddress to, const uint2& x) {
  asm volatile("st.shared.v2.u32 [%0 + %3], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y), "n"(kOffset) : "memory");
}

__device__ inline void store_shared_64(SharedAddress to, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

__device__ inline float4 load_shared_float4(SharedAddress from) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

}  // namespace mfx::device
