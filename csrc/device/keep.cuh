// Values that loops reuse. The compiler likes to compute cheap ones again in every iteration; what has gone through
// keep() it cannot. PTX ISA, "Data movement and conversion instructions: mov".
#pragma once

#include <cstdint>

namespace mfx::device {

__device__ inline void keep(std::uint32_t& x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
}
__device__ inline void keep(std::int32_t& x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
}
__device__ inline void keep(std::int64_t& x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
}
template <typename T>
__device__ inline void keep(const T*& x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
}

}  // namespace mfx::device
