// Division with the remainder on the other side.
#pragma once

#include <type_traits>

namespace mfx {

// Pieces of b that hold a.
template <typename T>
constexpr T ceil_div(T a, std::common_type_t<T> b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr T round_up(T n, std::common_type_t<T> multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace mfx
