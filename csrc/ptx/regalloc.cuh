// What a program may tell the compiler about registers. None of it computes anything. PTX ISA, "Inline PTX" and "Data
// movement and conversion instructions: mov".
#pragma once

#include <cstdint>

namespace mfx::device {

// Keeps a value that a loop reuses in its register, where the compiler would compute it again in every iteration.
__device__ inline void pin_in_register(std::uint32_t& x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
}
__device__ inline void pin_in_register(std::int32_t& x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
}
__device__ inline void pin_in_register(std::int64_t& x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
}
template <typename T>
__device__ inline void pin_in_register(const T*& x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
}

// pin_in_register() of what loops reuse, for 16-bit elements: of 32-bit ones fragments need the registers.
template <typename T, typename... Values>
__device__ inline void pin_if_16bit(Values&... values) {
  if constexpr (sizeof(T) == 2) (pin_in_register(values), ...);
}

// Makes the compiler forget what it knows of `x`, and so compute what follows from it here: moved out of a loop or kept
// from before one, it would take registers all along.
__device__ inline void hide_from_optimizer(std::uint32_t& x) {
  asm volatile("" : "+r"(x));
}
template <typename T>
__device__ inline void hide_from_optimizer(const T*& x) {
  asm volatile("" : "+l"(x));
}

// False, but the compiler does not know, nor that it is the same for another `n`: after `if (never(n)) return;` begins
// a new block of instructions, and what is in it is not interleaved with what comes before. For products of which ptxas
// would otherwise have more under way than there are registers for.
__device__ inline bool never(unsigned n) {
  return threadIdx.x + blockDim.y == 1025 + n;  // blocks are at most 1024 x 1
}

}  // namespace mfx::device
