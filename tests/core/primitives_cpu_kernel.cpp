// The primitives of csrc/core as C functions, once per instruction set; test_primitives.py calls them.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/brgemm.hpp"
#include "core/gelu.hpp"
#include "core/simd.hpp"
#include "core/tile_gemm.hpp"

#define MFX_JOIN(stem, isa) stem##_##isa
#define MFX_JOIN_EXPANDED(stem, isa) MFX_JOIN(stem, isa)
#define MFX_EXPORT(stem) extern "C" __attribute__((visibility("default"))) void MFX_JOIN_EXPANDED(stem, MFX_ISA)

namespace {

using namespace mfx;           // NOLINT
using namespace mfx::MFX_ISA;  // NOLINT
using std::int64_t;

// From's values through f into To's, whole vectors first and the rest as a partial one.
template <typename From, typename To, typename F>
void map(const From* in, To* out, int64_t n, F f) {
  constexpr int64_t w = kWidth<Accumulate<From>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(out + i, f(load(in + i)));
  if (i < n) store_partial(out + i, f(load_partial(in + i, static_cast<int>(n - i))), static_cast<int>(n - i));
}

template <typename T>
Vec<T> same(Vec<T> v) {
  return v;
}

// n must be a multiple of two vectors.
template <typename From>
void map_pairs(const From* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * kWidth<float>) {
    const VecPair<VecF> pair = in_order<From>(load_pair(in + i));
    store(out + i, pair.first);
    store(out + i + kWidth<float>, pair.second);
  }
}

}  // namespace

MFX_EXPORT(exp_f32)(const float* in, float* out, int64_t n) {
  map(in, out, n, [](VecF v) { return exp(v); });
}
MFX_EXPORT(exp_f64)(const double* in, double* out, int64_t n) {
  map(in, out, n, [](VecD v) { return exp(v); });
}
MFX_EXPORT(gelu_f32)(const float* in, float* out, int64_t n) {
  map(in, out, n, gelu<float>);
}
MFX_EXPORT(gelu_f64)(const double* in, double* out, int64_t n) {
  map(in, out, n, gelu<double>);
}
MFX_EXPORT(gelu_slope_f32)(const float* in, float* out, int64_t n) {
  map(in, out, n, gelu_slope<float>);
}
MFX_EXPORT(gelu_slope_f64)(const double* in, double* out, int64_t n) {
  map(in, out, n, gelu_slope<double>);
}

MFX_EXPORT(reciprocal_f32)(const float* in, float* out, int64_t n) {
  map(in, out, n, [](auto x) { return reciprocal(x); });
}

MFX_EXPORT(widen_bf16)(const BFloat16* in, float* out, int64_t n) {
  map(in, out, n, same<float>);
}
MFX_EXPORT(widen_f16)(const Float16* in, float* out, int64_t n) {
  map(in, out, n, same<float>);
}
// n must be a multiple of a vector.
MFX_EXPORT(widen_bytes)(const std::int8_t* in, std::int32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<float>) {
    const VecI32 wide = load_bytes(in + i);
    std::memcpy(out + i, &wide, sizeof(wide));
  }
}
MFX_EXPORT(widen_pairs_bf16)(const BFloat16* in, float* out, int64_t n) {
  map_pairs(in, out, n);
}
MFX_EXPORT(widen_pairs_f16)(const Float16* in, float* out, int64_t n) {
  map_pairs(in, out, n);
}
MFX_EXPORT(narrow_bf16)(const float* in, BFloat16* out, int64_t n) {
  map(in, out, n, same<float>);
}
MFX_EXPORT(narrow_f16)(const float* in, Float16* out, int64_t n) {
  map(in, out, n, same<float>);
}

// Two rows of floats as one VNNI row of bf16 pairs; n a multiple of a vector.
MFX_EXPORT(interleave_bf16)(const float* even, const float* odd, std::uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<float>) {
    const VecU32 row = interleave_bf16(load(even + i), load(odd + i));
    std::copy_n(reinterpret_cast<const std::uint32_t*>(&row), kWidth<float>, out + i);
  }
}

#define MFX_GEMM_ARGUMENTS(A, C) \
  (int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, C* c, int64_t ldc, int accumulate)
MFX_EXPORT(tile_gemm_native_f32) MFX_GEMM_ARGUMENTS(float, float) {
  tile_gemm_native(m, n, k, a, lda, b, ldb, c, ldc, accumulate != 0);
}
MFX_EXPORT(tile_gemm_native_f64) MFX_GEMM_ARGUMENTS(double, double) {
  tile_gemm_native(m, n, k, a, lda, b, ldb, c, ldc, accumulate != 0);
}
MFX_EXPORT(tile_gemm_f32) MFX_GEMM_ARGUMENTS(float, float) {
  tile_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate != 0);
}
MFX_EXPORT(tile_gemm_bf16) MFX_GEMM_ARGUMENTS(BFloat16, float) {
  const BrgemmScope scope;
  tile_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate != 0);
}
