// The erf GELU, gelu(z) = z cdf(z) with the normal distribution's cumulative function, and its slope.
//
// cdf(-a) = exp(-a^2 / 2) q(t) / (1 + sqrt(2) a) for a >= 0, with t = (a - c) / (a + c): q is so smooth that a short
// polynomial (Chebyshev nodes over all a whose exponential is not zero) reaches a few ulp. Unlike (1 + erf) / 2 this
// cancels nowhere, so that the lower tail is right to its last digits too, and the slope needs the same exponential.
//
// For *_cpu_kernel.cpp files, like core/simd.hpp.
#pragma once

#include "core/simd.hpp"

namespace mfx::MFX_ISA {

template <typename T>
struct GeluConstants;

template <>
struct GeluConstants<float> {
  static constexpr float kLargest = 14.0f;          // the density of anything larger is zero
  static constexpr float kExponent = -87.0f;        // where exp_bounded ends
  static constexpr float kCentre = 3.53553390593f;  // c = 2.5 sqrt(2)
  static constexpr float q[] = {2.33027357383e-4f,  1.73585880051e-4f,  -2.14574366293e-3f, 5.04984636316e-4f,
                                1.63690192432e-2f,  -5.14918134456e-2f, 7.88163178489e-2f,  -4.9511670766e-2f,
                                -6.11784358685e-2f, 6.32419085557e-1f};
};

template <>
struct GeluConstants<double> {
  static constexpr double kLargest = 39.0;
  static constexpr double kExponent = -708.0;
  static constexpr double kCentre = 5.3033008588991064330;  // c = 3.75 sqrt(2)
  static constexpr double q[] = {
      -1.2054107682711165202e-9, -4.3910628674017601187e-10, 1.6425417781166579546e-8,  7.9981676077868539181e-9,
      -1.2630732633757752362e-7, -2.4079198108364245107e-8,  8.7405952341959821397e-7,  -4.9008333779292887558e-7,
      -5.7214954634027191309e-6, 1.1193629819115067174e-5,   2.5824456734799930967e-5,  -1.4507748264785463065e-4,
      1.4685683315544308005e-4,  8.7781300857600192352e-4,   -4.8732897767159368309e-3, 1.4181138700228861271e-2,
      -2.9346699295154706232e-2, 4.6152160580765577791e-2,   -5.4401965070856179616e-2, 4.1138369245056018458e-2,
      1.79270774273188957e-3,    -7.0120299292773340401e-2,  6.1875631541891379061e-1};
};

template <typename T>
struct NormalDistribution {
  Vec<T> cdf;      // P(Z <= z)
  Vec<T> density;  // exp(-z^2 / 2) / sqrt(2 pi)
};

template <typename T>
inline NormalDistribution<T> normal_distribution(Vec<T> z) {
  using C = GeluConstants<T>;
  const Vec<T> magnitude = min(z < T{0} ? -z : z, broadcast(C::kLargest));
  const Vec<T> exponent = magnitude * magnitude * T{-0.5};
  const Vec<T> bounded = exp_bounded(max(exponent, broadcast(C::kExponent)));
  const Vec<T> bell = exponent < C::kExponent ? Vec<T>{} : bounded;
  const Vec<T> sum = magnitude + C::kCentre;
  const Vec<T> slope = magnitude * T(1.4142135623730950488) + T{1};
  const Vec<T> inverse = T{1} / (sum * slope);  // one division for two quotients
  const Vec<T> t = (magnitude - C::kCentre) * slope * inverse;
  Vec<T> q = broadcast(C::q[0]);
  for (std::size_t i = 1; i < sizeof(C::q) / sizeof(T); ++i) q = q * t + C::q[i];
  const Vec<T> tail = bell * q * (sum * inverse);
  return {z < T{0} ? tail : T{1} - tail, bell * T(0.39894228040143267794)};
}

template <typename T>
inline Vec<T> gelu(Vec<T> z) {
  return z * normal_distribution<T>(z).cdf;
}

// d gelu(z) / dz
template <typename T>
inline Vec<T> gelu_slope(Vec<T> z) {
  const NormalDistribution<T> normal = normal_distribution<T>(z);
  return normal.cdf + z * normal.density;
}

}  // namespace mfx::MFX_ISA
