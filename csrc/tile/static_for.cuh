// Loops whose index is a compile-time constant, for instructions that take immediates and arrays that must stay in
// registers.
#pragma once

#include <type_traits>
#include <utility>

namespace mfx::device {

template <int... kIndices, typename Body>
__device__ inline void static_for(std::integer_sequence<int, kIndices...>, Body&& body) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

template <int kCount, typename Body>
__device__ inline void static_for(Body&& body) {
  static_for(std::make_integer_sequence<int, kCount>{}, body);
}

}  // namespace mfx::device
