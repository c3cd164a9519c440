// Vectors as wide as the instruction set this file is compiled for, on gcc's vector extensions: arithmetic,
// comparison (giving an integer mask) and `mask ? a : b` are the language's own operators.
//
// For *_cpu_kernel.cpp files alone, which are compiled once per instruction set; everything is in that instruction
// set's namespace, so that the linker can never merge two compilations of one function.
#pragma once

#ifndef MFX_ISA
#error "core/simd.hpp belongs in *_cpu_kernel.cpp files, which are compiled once per instruction set"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/float16.hpp"

#if defined(MFX_ISA_AVX512_BF16)
#define MFX_ISA_AVX512 1
#endif

namespace mfx::MFX_ISA {

#if defined(MFX_ISA_AVX512)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(MFX_ISA_AVX2)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
using VecF = Vec<float>;
using VecD = Vec<double>;
using VecU32 = Vec<std::uint32_t>;
using VecU64 = Vec<std::uint64_t>;
using VecI32 = Vec<std::int32_t>;
typedef std::uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as VecF

template <typename T>
inline constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

// The type that values stored as T are computed in.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // vector minus zero keeps the sign of zero, which plus zero would not
}

template <typename V, typename T>
inline V load_raw(const T* p) {
  V v;
  static_assert(sizeof(V) <= static_cast<std::size_t>(kVectorBytes));
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline VecF load(const float* p) {
  return load_raw<VecF>(p);
}
inline VecD load(const double* p) {
  return load_raw<VecD>(p);
}
// gcc takes vector conversions between 16 and 32 bits apart into halves, hence the instructions by name.
inline VecU32 widen_u16(VecU16 v) {
#if defined(MFX_ISA_AVX512)
  return reinterpret_cast<VecU32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(MFX_ISA_AVX2)
  return reinterpret_cast<VecU32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, VecU32);
#endif
}
// A vector's lanes of bytes as integers.
inline VecI32 load_bytes(const std::int8_t* bytes) {
#if defined(MFX_ISA_AVX512)
  return reinterpret_cast<VecI32>(_mm512_cvtepi8_epi32(load_raw<__m128i>(bytes)));
#elif defined(MFX_ISA_AVX2)
  return reinterpret_cast<VecI32>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#elif defined(__SSE2__)  // gcc would take the lanes one by one
  const __m128i four = _mm_cvtsi32_si128(load_raw<int>(bytes));
  const __m128i twice = _mm_unpacklo_epi8(four, four);
  return reinterpret_cast<VecI32>(_mm_unpacklo_epi16(twice, twice)) >> 24;
#else
  typedef std::int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  return __builtin_convertvector(load_raw<Bytes>(bytes), VecI32);
#endif
}
inline VecF load(const BFloat16* p) {
  return reinterpret_cast<VecF>(widen_u16(load_raw<VecU16>(p)) << 16);
}
inline VecF load(const Float16* p) {
#if defined(MFX_ISA_AVX512)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(MFX_ISA_AVX2)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  VecF v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Lane i of the result is lane lane_of(i) of a and b, whose lanes are numbered on. lane_of captures nothing.
template <typename V, typename LaneOf>
inline V shuffle(V a, V b, LaneOf) {
  constexpr int kLanes = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return V(__builtin_shufflevector(a, b, LaneOf{}(i)...));
  }(std::make_integer_sequence<int, kLanes>{});
#else  // gcc has the other, too, from version 12 on
  using Lane = std::conditional_t<sizeof(a[0]) == 8, std::int64_t,
                                  std::conditional_t<sizeof(a[0]) == 4, std::int32_t, std::int16_t>>;
  typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Lane>(LaneOf{}(i));
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Two vectors of consecutive values, read at once. Widening bf16 is cheapest when the two hold the even and the odd
// values, so the order is the type's own: sums over values need not care, and in_order() restores it.
template <typename V>
struct VecPair {
  V first, second;
};
inline VecPair<VecF> load_pair(const float* p) {
  return {load(p), load(p + kWidth<float>)};
}
inline VecPair<VecD> load_pair(const double* p) {
  return {load(p), load(p + kWidth<double>)};
}
inline VecPair<VecF> load_pair(const BFloat16* p) {
  const VecU32 both = load_raw<VecU32>(p);
  return {reinterpret_cast<VecF>(both << 16), reinterpret_cast<VecF>(both & 0xffff0000u)};
}
inline VecPair<VecF> load_pair(const Float16* p) {
#if defined(MFX_ISA_AVX512)
  const __m512i both = load_raw<__m512i>(p);
  return {reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm512_castsi512_si256(both))),
          reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1)))};
#else
  return {load(p), load(p + kWidth<float>)};
#endif
}

template <typename T, typename V>
inline VecPair<V> in_order(VecPair<V> pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int w = kWidth<float>;
    return {shuffle(pair.first, pair.second, [](int i) { return i / 2 + i % 2 * w; }),
            shuffle(pair.first, pair.second, [](int i) { return (i + w) / 2 + i % 2 * w; })};
  } else {
    return pair;
  }
}

// bf16 bits of each lane, in the low half, rounded to nearest even.
inline VecU32 round_bf16(VecF v) {
  const VecU32 bits = reinterpret_cast<VecU32>(v);
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : ((bits >> 16) | 0x40u);
}

inline void store(float* p, VecF v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(double* p, VecD v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(BFloat16* p, VecF v) {
#if defined(MFX_ISA_AVX512_BF16)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &half, sizeof half);
#else
#if defined(MFX_ISA_AVX512)
  const __m256i half = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(round_bf16(v)));
#else
  const VecU16 half = __builtin_convertvector(round_bf16(v), VecU16);
#endif
  std::memcpy(p, &half, sizeof half);
#endif
}
inline void store(Float16* p, VecF v) {
#if defined(MFX_ISA_AVX512)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#elif defined(MFX_ISA_AVX2)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kWidth<float>; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// store() past the caches, for results that nobody reads soon: the line is not read first. p is aligned to what is
// stored; stream_fence() before another thread reads it.
inline void stream(float* p, VecF v) {
#if defined(MFX_ISA_AVX512)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(MFX_ISA_AVX2)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
inline void stream(double* p, VecD v) {
  stream(reinterpret_cast<float*>(p), reinterpret_cast<VecF>(v));
}
template <typename Half>
inline void stream(Half* p, VecF v) {
#if defined(MFX_ISA_AVX512)
  alignas(32) Half half[kWidth<float>];
  store(half, v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(half));
#elif defined(MFX_ISA_AVX2)
  alignas(16) Half half[kWidth<float>];
  store(half, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(half));
#else
  store(p, v);
#endif
}
inline void stream_fence() {
#if defined(MFX_ISA_AVX512) || defined(MFX_ISA_AVX2)
  _mm_sfence();
#endif
}

// Pairs (even[i], odd[i]) of 16-bit values as they are, even in the low half.
template <typename Half>
inline VecU32 interleave_halves(const Half* even, const Half* odd) {
  return widen_u16(load_raw<VecU16>(even)) | (widen_u16(load_raw<VecU16>(odd)) << 16);
}

// The first n lanes (0 <= n <= width); the rest read as zero, or are left unwritten.
template <typename T>
inline Vec<Accumulate<T>> load_partial(const T* p, int n) {
  T lanes[kWidth<Accumulate<T>>] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_partial(T* p, Vec<Accumulate<T>> v, int n) {
  T lanes[kWidth<Accumulate<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(T));
}
#if defined(MFX_ISA_AVX512)
template <>
inline VecF load_partial<float>(const float* p, int n) {
  return reinterpret_cast<VecF>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
}
template <>
inline void store_partial<float>(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
}
#endif

// f(column, lanes) over [0, n) in whole vectors and one partial one.
template <typename A, typename F>
inline void for_lanes(std::int64_t n, F f) {
  std::int64_t column = 0;
  for (; column + kWidth<A> <= n; column += kWidth<A>) f(column, kWidth<A>);
  if (column < n) f(column, static_cast<int>(n - column));
}
template <typename S>
inline Vec<Accumulate<S>> load_lanes_of(const S* p, int lanes) {
  return lanes == kWidth<Accumulate<S>> ? load(p) : load_partial(p, lanes);
}
template <typename S>
inline void store_lanes_of(S* p, Vec<Accumulate<S>> v, int lanes) {
  if (lanes == kWidth<Accumulate<S>>) {
    store(p, v);
  } else {
    store_partial(p, v, lanes);
  }
}

template <typename From, typename To>
inline void convert(const From* from, std::int64_t n, To* to) {
  for_lanes<Accumulate<From>>(
      n, [&](std::int64_t i, int lanes) { store_lanes_of(to + i, load_lanes_of(from + i, lanes), lanes); });
}

// Two rows of B for a bf16 brgemm: lane i holds the pair (even[i], odd[i]) of a VNNI row.
inline VecU32 interleave_bf16(VecF even, VecF odd) {
#if defined(MFX_ISA_AVX512_BF16)
  const VecU32 low = widen_u16(reinterpret_cast<VecU16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(even))));
  const VecU32 high = widen_u16(reinterpret_cast<VecU16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(odd))));
  return low | (high << 16);
#else
  return round_bf16(even) | (round_bf16(odd) << 16);
#endif
}

// Transposes a square block, one row per lane: swaps its off-diagonal blocks of 1, 2, 4, ... lanes.
template <int kStep, typename T>
inline void transpose_step(Vec<T>* rows) {
  constexpr int w = kWidth<T>;
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i & kStep) continue;
    const Vec<T> a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, [](int lane) { return lane & kStep ? w + lane - kStep : lane; });
    rows[i + kStep] = shuffle(a, b, [](int lane) { return lane & kStep ? w + lane : lane + kStep; });
  }
  if constexpr (2 * kStep < kWidth<T>) transpose_step<2 * kStep, T>(rows);
}
template <typename T>
inline void transpose(Vec<T>* rows) {
  transpose_step<1, T>(rows);
}

template <typename V>
inline V min(V a, V b) {
  return a < b ? a : b;
}
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

// By halves, which is a logarithmic number of steps, each of independent lanes.
template <typename V>
inline auto reduce_add(V v) {
  using T = std::remove_reference_t<decltype(v[0])>;
  if constexpr (sizeof(V) > 16) {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    return reduce_add(half[0] + half[1]);
  } else if constexpr (sizeof(V) / sizeof(T) == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}
// Each v holds sums that are still spread over kSegment lanes each; adds the halves of the segments, two vectors at a
// time, until one vector of finished sums is left.
template <int kSegment, typename V, int kCount>
inline V add_segments(const V (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    using T = std::remove_cvref_t<decltype(v[0][0])>;
    constexpr int w = kWidth<T>, half = kSegment / 2, segments = w / kSegment;
    constexpr auto low = [](int lane) {
      const int segment = lane / half;
      return segment / segments * w + segment % segments * kSegment + lane % half;
    };
    constexpr auto high = [](int lane) { return decltype(low){}(lane) + half; };
    V sum[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) {
      sum[i] = shuffle(v[2 * i], v[2 * i + 1], low) + shuffle(v[2 * i], v[2 * i + 1], high);
    }
    return add_segments<half>(sum);
  }
}

// Lane i of the result is the sum of the lanes of v[i].
template <typename V, int kCount>
inline V reduce_add_each(const V (&v)[kCount]) {
  static_assert(kCount * sizeof(v[0][0]) == sizeof(V));
  return add_segments<kCount>(v);
}

template <typename V>
inline auto reduce_max(V v) {
  auto best = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// 1 / x to less than 1 ulp, exact for powers of 2, where x and 1 / x are normal numbers. The processor's estimate and
// one step of third order: all on the multipliers, where a division blocks its unit for as long as a whole exponential.
inline VecF reciprocal(VecF x) {
#if defined(MFX_ISA_AVX512)
  // Fused by name: rounded in between, the correction of a guess that is off by 2^-14 is off by more than an ulp.
  const __m512 y = _mm512_rcp14_ps(reinterpret_cast<__m512>(x));
  const __m512 h = _mm512_fnmadd_ps(reinterpret_cast<__m512>(x), y, _mm512_set1_ps(1.0f));
  return reinterpret_cast<VecF>(_mm512_fmadd_ps(y, _mm512_fmadd_ps(h, h, h), y));
#else
  return 1.0f / x;
#endif
}
inline VecD reciprocal(VecD x) {
  return 1.0 / x;
}

// e^x to about 1 ulp for |x| <= 87 (float) or 708 (double), where no scaling can overflow; outside, undefined.
// x = n ln 2 + r, with n by adding and subtracting 1.5 * 2^mantissa (and the bias of exponents, so that the low bits of
// the sum are those of 2^n), then a polynomial in |r| <= ln 2 / 2. Multiplied by 2^n it stays NaN where it is.
inline VecF exp_bounded(VecF x) {
  constexpr float kShift = 12582912.0f + 127;
  const VecF shifted = x * 1.44269504088896341f + kShift;
  const VecF n = shifted - kShift;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return p * reinterpret_cast<VecF>(reinterpret_cast<VecU32>(shifted) << 23);
}

inline VecD exp_bounded(VecD x) {
  constexpr double kShift = 6755399441055744.0 + 1023;
  const VecD shifted = x * 1.4426950408889634074 + kShift;
  const VecD n = shifted - kShift;
  const VecD r = (x - n * 0.69314718055966295651) - n * 2.8235290563031577122e-13;
  VecD p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + (r + 1.0);
  return p * reinterpret_cast<VecD>(reinterpret_cast<VecU64>(shifted) << 52);
}

// e^x everywhere: 0 and infinity at the ends (with gradual underflow cut off), NaN for NaN.
inline VecF exp(VecF x) {
  const VecF inside = exp_bounded(min(max(x, broadcast(-87.0f)), broadcast(88.0f)));
  const VecF high = x > 88.72283f ? broadcast(__builtin_inff()) : inside * exp_bounded(x - 88.0f);
  const VecF value = x > 88.0f ? high : inside;
  return x < -87.0f ? VecF{} : (x == x ? value : x);
}
inline VecD exp(VecD x) {
  const VecD inside = exp_bounded(min(max(x, broadcast(-708.0)), broadcast(709.0)));
  const VecD high = x > 709.782712893384 ? broadcast(__builtin_inf()) : inside * exp_bounded(x - 709.0);
  const VecD value = x > 709.0 ? high : inside;
  return x < -708.0 ? VecD{} : (x == x ? value : x);
}

// f(T{}) with the type that values of a dtype are stored in.
template <typename F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
  }
}

// The same where it computes in A: only double computes in double.
template <typename A, typename F>
inline void with_storage(DType dtype, F f) {
  with_dtype(dtype, [&](auto storage) {
    if constexpr (std::is_same_v<Accumulate<decltype(storage)>, A>) f(storage);
  });
}

}  // namespace mfx::MFX_ISA
