// A value that the compiler knows nothing about from here on. PTX ISA, "Inline PTX": an empty statement.
#pragma once

#include <cstdint>

namespace mfx::device {

// Keeps what is computed from `x` inside a loop: moved out of it, it would take registers for the whole loop.
__device__ inline void make_opaque(std::uint32_t& x) {
  asm volatile("" : "+r"(x));
}
template <typename T>
__device__ inline void make_opaque(const T*& x) {
  asm volatile("" : "+l"(x));
}

// False, but the compiler does not know, nor that it is the same for another `n`: after `if (never(n)) return;` begins
// a new block of instructions, and what is in it is not interleaved with what comes before. For products of which ptxas
// would otherwise have more under way than there are registers for.
__device__ inline bool never(unsigned n) {
  return threadIdx.x + blockDim.y == 1025 + n;  // blocks are at most 1024 x 1
}

}  // namespace mfx::device
