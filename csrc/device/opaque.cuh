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

}  // namespace mfx::device
