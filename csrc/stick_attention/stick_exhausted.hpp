// The one question of the early exit, for host and device. Plain C++.
#pragma once

namespace mfx {

// An epsilon that leaves no stick exhausted.
inline constexpr double kNeverExhausted = -1.0;

// The epsilon that kernels compare with, of an op's stick_epsilon, where 0 says never.
constexpr double exit_epsilon(double stick_epsilon) {
  return stick_epsilon > 0 ? stick_epsilon : kNeverExhausted;
}

// Whether so little is left of a stick that its row needs no older keys. A stick that is NaN is not exhausted: the walk
// goes on, so that a row that has met NaN says the same whatever stick_epsilon is.
template <typename Rem>
constexpr bool exhausted(Rem rem, Rem epsilon) {
  return rem <= epsilon;
}

}  // namespace mfx
