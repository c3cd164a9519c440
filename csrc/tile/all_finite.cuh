// Whether results that are about to be stored are finite.
#pragma once

#include "ptx/warp.cuh"
#include "tile/operand.cuh"

namespace mfx::device {

// Whether all words that a warp's lanes hold, elements of type Op, are finite, the same in all lanes. 16-bit ones are
// multiplied with one another, six words a lane at a time: what is not finite stays so in a product of matrices. Where
// squares overflow the answer may be no. 32-bit ones are multiplied with 0: rounded to tf32 they would take registers.
template <typename Op, int... kWords>
__device__ inline bool warp_all_finite(const std::uint32_t (&... words)[kWords]) {
  float sum[4] = {};
  const auto add = [&](const auto& of, int count) {
    if constexpr (kIs16Bit<Op>) {
      const auto at = [&](int i) { return i < count ? of[i] : 0; };
#pragma unroll
      for (int i = 0; i < count; i += 6) {
        const FragmentA a = {at(i), at(i + 1), at(i + 2), at(i + 3)};
        multiply_step<Op>(sum, a, at(i + 4), at(i + 5));
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) sum[i % 4] = __fmaf_rn(__uint_as_float(of[i]), 0.0f, sum[i % 4]);
    }
  };
  (add(words, kWords), ...);
  return __all_sync(kAllLanes, fabsf((sum[0] + sum[1]) + (sum[2] + sum[3])) < __int_as_float(0x7f800000));
}

}  // namespace mfx::device
