// How tensor cores add. NVIDIA documents none of it; this follows what has been measured:
//   M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
//   Science 7:e330, 2021
//   F. A. Khattak, M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv:2512.07004, 2025
//
// Products are exact. A block of them (`terms` below) is added to the accumulator in fixed point: every term is aligned
// to the largest exponent among them, keeps `extraBits` bits below binary32's 23 and loses the rest, towards zero. The
// sum is normalised once and truncated to binary32. A long inner product repeats this block by block, so its errors all
// have one sign and grow with its length, unlike those of rounding to nearest.
//
// With CUDASIM_TENSOR_TRUNCATE=0 elements are accumulated one by one by fused multiply-add instead, as are integers,
// of which all sums are exact.
#include <algorithm>
#include <cmath>
#include <vector>

#include "float_formats.h"
#include "rounding.h"
#include "tensor_core.h"

namespace cudasim {
namespace {

constexpr int kStrip = 8;               // columns at a time
constexpr int kZero = -100000;          // the exponent of a zero
constexpr int kLow = -90, kHigh = 100;  // exponents between which binary32 can scale all terms

struct SumRules {
  int terms, extraBits, minExponent;  // minExponent: of the operands; subnormals are not normalised
};

SumRules rulesOf(Elem operands) {
  const bool hopper = config().arch >= 90;
  switch (operands) {
    case Elem::TF32: return {hopper ? 8 : 4, hopper ? 2 : 1, -126};
    case Elem::BF16: return {hopper ? 16 : 8, hopper ? 2 : 1, -126};
    case Elem::F16: return {hopper ? 16 : 8, hopper ? 2 : 1, -14};
    case Elem::E4M3: return {hopper ? 32 : 16, -10, -6};
    default: return {hopper ? 32 : 16, -10, -14};  // e5m2
  }
}

int exponentOf(float x, int min) {
  return x == 0 ? kZero : std::max((int)(bitsOf(x) >> 23 & 255) - 127, min);
}

// One block of one element, whatever the exponents.
float sumAnywhere(const float* a, const float* b, int stride, int terms, float c, int top, int extraBits) {
  const double scale = std::ldexp(1.0, 23 + extraBits - top);
  double sum = std::trunc(c * scale);
  for (int t = 0; t < terms; t++) sum += std::trunc((double)a[t] * b[t * stride] * scale);
  const double value = sum / scale;
  return std::fabs(value) >= 0x1p128 ? (float)value : narrowRounded(value, Round::Zero);
}

// A strip of columns of B, with the exponents of its elements.
struct Strip {
  std::vector<float> value;
  std::vector<int> exponent;
  bool finite[kStrip];

  void load(const float* b, int k, int n, int minExponent) {
    value.resize(k * kStrip);
    exponent.resize(k * kStrip);
    std::fill_n(finite, kStrip, true);
    for (int t = 0; t < k; t++)
      for (int j = 0; j < kStrip; j++) {
        const float x = b[t * n + j];
        finite[j] &= std::isfinite(x);
        value[t * kStrip + j] = std::isfinite(x) ? x : 0;
        exponent[t * kStrip + j] = exponentOf(value[t * kStrip + j], minExponent);
      }
  }
};

void addBlock(const SumRules& r, const float* a, const int* exponentA, const float* b, const int* exponentB, int terms,
              float* c) {
  int top[kStrip];
  for (int j = 0; j < kStrip; j++) top[j] = exponentOf(c[j], -126);
  for (int t = 0; t < terms; t++)
    for (int j = 0; j < kStrip; j++) top[j] = std::max(top[j], exponentA[t] + exponentB[t * kStrip + j]);

  float scale[kStrip], unit[kStrip];
  for (int j = 0; j < kStrip; j++) {
    const int e = std::min(std::max(top[j], kLow), kHigh);
    scale[j] = floatOf((uint32_t)(127 + 23 + r.extraBits - e) << 23);
    unit[j] = floatOf((uint32_t)(127 - 23 - r.extraBits + e) << 23);
  }
  long long sum[kStrip];
  for (int j = 0; j < kStrip; j++) sum[j] = (int)(c[j] * scale[j]);
  for (int t = 0; t < terms; t++)
    for (int j = 0; j < kStrip; j++) sum[j] += (int)(a[t] * b[t * kStrip + j] * scale[j]);
  for (int j = 0; j < kStrip; j++) {
    if (top[j] < kLow || top[j] > kHigh) {
      c[j] = top[j] < kZero / 2 ? 0 : sumAnywhere(a, b + j, kStrip, terms, c[j], top[j], r.extraBits);
      continue;
    }
    const double total = doubleOf(bitsOf((double)sum[j]) & ~((1ull << 29) - 1));  // 24 significant bits
    c[j] = (float)(total * unit[j]);
  }
}

void addOneByOne(const float* a, const float* b, float* c, int k, int n, int columns) {
  for (int t = 0; t < k; t++)
    for (int j = 0; j < columns; j++) c[j] = __builtin_fmaf(a[t], b[t * n + j], c[j]);
}

}  // namespace

void multiplyAccumulate(Elem operands, const float* a, const float* b, float* c, int m, int n, int k) {
  if (!config().tensorTruncate || operands == Elem::S8 || operands == Elem::U8) {
    for (int i = 0; i < m; i++) addOneByOne(a + i * k, b, c + i * n, k, n, n);
    return;
  }
  const SumRules r = rulesOf(operands);
  static thread_local std::vector<int> exponentA;
  static thread_local std::vector<char> finiteA;
  static thread_local Strip strip;
  exponentA.resize(m * k);
  finiteA.assign(m, true);
  for (int i = 0; i < m * k; i++) {
    finiteA[i / k] &= std::isfinite(a[i]);
    exponentA[i] = exponentOf(a[i], r.minExponent);
  }
  for (int j0 = 0; j0 < n; j0 += kStrip) {
    strip.load(b + j0, k, n, r.minExponent);
    for (int i = 0; i < m; i++) {
      float* ci = c + i * n + j0;
      float sums[kStrip];
      bool ordinary[kStrip];
      for (int j = 0; j < kStrip; j++) {
        ordinary[j] = finiteA[i] && strip.finite[j] && std::isfinite(ci[j]);
        sums[j] = ordinary[j] ? ci[j] : 0;
      }
      if (finiteA[i])
        for (int t = 0; t < k; t += r.terms)
          addBlock(r, a + i * k + t, &exponentA[i * k + t], &strip.value[t * kStrip], &strip.exponent[t * kStrip],
                   std::min(r.terms, k - t), sums);
      for (int j = 0; j < kStrip; j++)
        if (ordinary[j])
          ci[j] = sums[j];
        else
          addOneByOne(a + i * k, b + j0 + j, ci + j, k, n, 1);
    }
  }
}

}  // namespace cudasim
