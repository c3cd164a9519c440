// A few rows of 16-bit x by a panel of 4-bit numbers, in integers: widening numbers to floats takes longer than reading
// them. In every group of 32, x is an integer q of 14 bits times a power of two,
//
//   q = 128 high + low,   |high| <= 64,   -64 <= low < 64
//
// which is exact for bf16 down to 1/32 of the group's largest value, and for fp16 to 1/4; below, the error is 2^-13 of
// it at most. Numbers are taken as u = n + 8, from 0 to 15, and 8 times the sum of q is taken from a group's sum, which
// is exact: that with high or low fits into 16 bits.
#pragma once

#include <algorithm>

#include "core/simd.hpp"
#include "quantised_gemm/panel.hpp"

namespace mfx::MFX_ISA {

#if defined(MFX_ISA_AVX512) || defined(MFX_ISA_AVX2)
inline constexpr bool kHasByteProducts = true;

// Bytes or pairs of bytes; the instructions do not ask which.
#if defined(MFX_ISA_AVX512)
using Bytes = __m512i;
#define MFX_BYTES(name) _mm512_##name
#else
using Bytes = __m256i;
#define MFX_BYTES(name) _mm256_##name
#endif

// The numbers of the even rows and of the odd rows in bytes of two, n + 8.
struct Nibbles {
  Bytes even, odd;

  explicit Nibbles(Bytes bytes) {
    const Bytes low_half = MFX_BYTES(set1_epi8)(15), sign = MFX_BYTES(set1_epi8)(8);
#if defined(MFX_ISA_AVX512)
    constexpr int kAndThenXor = 0x6a;  // (a & b) ^ c
    even = _mm512_and_si512(bytes, low_half);
    odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low_half, sign, kAndThenXor);
#else
    even = _mm256_and_si256(bytes, low_half);
    odd = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half), sign);
#endif
  }
};

// sums[r][k]: over a group of rows of the matrix, the products of n + 8 with q of kRows rows of x. `values` is where
// the group's bytes of these kVectorBytes columns begin, `words` the group's in ByteRows. Vector k has the columns 4 k
// to 4 k + 3 of every 16.
#if defined(__AVX512VNNI__)
inline constexpr int kBytesInWord = 4;  // rows of bytes that one instruction multiplies

template <int kRows>
inline void sum_group(const std::int8_t* values, const std::int32_t* const (&words)[kRows], VecI32 (&sums)[kRows][4]) {
  for (int half = 0; half < 2; ++half) {  // one at a time: the sums of four rows fit into the registers
    Bytes high[kRows][2] = {}, low[kRows][2] = {};
    for (std::int64_t l = 0; l < kQuantisedGroup; l += 2 * kBytesInWord) {
      Bytes rows[kBytesInWord];
      for (int i = 0; i < kBytesInWord; ++i) {
        const std::int8_t* const bytes = values + (l / 2 + i) * kPanel;
        if (half == 0) prefetch_far(bytes + kPanelBytesAhead);
        rows[i] = load_raw<Bytes>(bytes);
      }
      const auto interleave = [half](Bytes a, Bytes b) {
        return half == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
      };
      const Bytes first = interleave(rows[0], rows[1]), second = interleave(rows[2], rows[3]);
      const Nibbles numbers[2] = {Nibbles(_mm512_unpacklo_epi16(first, second)),
                                  Nibbles(_mm512_unpackhi_epi16(first, second))};
      for (int r = 0; r < kRows; ++r) {
        const auto add = [&](Bytes& sum, Bytes numbers_of_rows, int word) {
          sum = _mm512_dpbusd_epi32(sum, numbers_of_rows, _mm512_set1_epi32(words[r][l + word]));
        };
        for (int i = 0; i < 2; ++i) {
          add(high[r][i], numbers[i].even, 0);
          add(high[r][i], numbers[i].odd, 1);
          add(low[r][i], numbers[i].even, 2);
          add(low[r][i], numbers[i].odd, 3);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        sums[r][2 * half + i] = (reinterpret_cast<VecI32>(high[r][i]) << 7) + reinterpret_cast<VecI32>(low[r][i]);
      }
    }
  }
}
#else
inline constexpr int kBytesInWord = 2;

template <int kRows>
inline void sum_group(const std::int8_t* values, const std::int32_t* const (&words)[kRows], VecI32 (&sums)[kRows][4]) {
  Bytes high[kRows][2] = {}, low[kRows][2] = {};
  for (std::int64_t l = 0; l < kQuantisedGroup; l += 2 * kBytesInWord) {
    const std::int8_t* const bytes = values + l / 2 * kPanel;
    prefetch_far(bytes + kPanelBytesAhead);
    prefetch_far(bytes + kPanelBytesAhead + kPanel);
    const Bytes row = load_raw<Bytes>(bytes), next = load_raw<Bytes>(bytes + kPanel);
    const Nibbles numbers[2] = {Nibbles(MFX_BYTES(unpacklo_epi8)(row, next)),
                                Nibbles(MFX_BYTES(unpackhi_epi8)(row, next))};
    for (int r = 0; r < kRows; ++r) {
      const auto add = [&](Bytes& sum, Bytes numbers_of_rows, int word) {
        const Bytes x = MFX_BYTES(set1_epi32)(words[r][l + word]);
        sum = MFX_BYTES(add_epi16)(sum, MFX_BYTES(maddubs_epi16)(numbers_of_rows, x));
      };
      for (int i = 0; i < 2; ++i) {
        add(high[r][i], numbers[i].even, 0);
        add(high[r][i], numbers[i].odd, 1);
        add(low[r][i], numbers[i].even, 2);
        add(low[r][i], numbers[i].odd, 3);
      }
    }
  }
  const Bytes weights = MFX_BYTES(set1_epi32)(1 << 16 | 128);  // of the high and the low parts
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2; ++i) {
      const Bytes both[2] = {MFX_BYTES(unpacklo_epi16)(high[r][i], low[r][i]),
                             MFX_BYTES(unpackhi_epi16)(high[r][i], low[r][i])};
      for (int k = 0; k < 2; ++k) {
        sums[r][2 * i + k] = reinterpret_cast<VecI32>(MFX_BYTES(madd_epi16)(both[k], weights));
      }
    }
  }
}
#endif
#undef MFX_BYTES

// Four vectors of consecutive columns in the order of the sums: vector k has the columns 4 k to 4 k + 3 of every 16.
inline void order_as_sums(const VecF (&in)[4], VecF (&out)[4]) {
  if constexpr (kWidth<float> == 16) {
    const auto first = [](int i) { return i / 4 % 2 * 16 + i / 8 * 4 + i % 4; };
    const auto second = [](int i) { return 8 + i / 4 % 2 * 16 + i / 8 * 4 + i % 4; };
    const auto left = [](int i) { return i / 8 * 16 + i % 8; };
    const auto right = [](int i) { return 8 + i / 8 * 16 + i % 8; };
    const VecF a = shuffle(in[0], in[1], first), b = shuffle(in[2], in[3], first);
    const VecF c = shuffle(in[0], in[1], second), d = shuffle(in[2], in[3], second);
    out[0] = shuffle(a, b, left);
    out[1] = shuffle(a, b, right);
    out[2] = shuffle(c, d, left);
    out[3] = shuffle(c, d, right);
  } else {
    const auto left = [](int i) { return i / 4 * 8 + i % 4; };
    const auto right = [](int i) { return 4 + i / 4 * 8 + i % 4; };
    for (int k = 0; k < 4; k += 2) {
      out[k] = shuffle(in[k / 2], in[2 + k / 2], left);
      out[k + 1] = shuffle(in[k / 2], in[2 + k / 2], right);
    }
  }
}
inline std::int64_t column_of_sum(std::int64_t i) {
  constexpr int w = kWidth<float>;
  const std::int64_t block = i / (4 * w) * (4 * w), vector = i % (4 * w) / w, lane = i % w;
  return block + lane / 4 * 16 + vector * 4 + lane % 4;
}
#else
inline constexpr bool kHasByteProducts = false;
inline constexpr int kBytesInWord = 2;
#endif

// Rows of x as such integers.
struct ByteRows {
  // [rows, stride]: from every four rows of the matrix on, the high parts of the even ones and of the odd ones, then
  // the low parts. A word is kBytesInWord of them, those of two twice.
  std::int32_t* words;
  float* scales;        // [rows, stride / kQuantisedGroup]: what q is multiplied with
  std::int32_t* rests;  // the same: 8 times the sum of q
  std::int64_t stride;

  // From x, zeros up to whole groups.
  void fill(std::int64_t row, const float* x) const {
    constexpr int w = kWidth<float>, kVectors = static_cast<int>(kQuantisedGroup) / w;
    for (std::int64_t l = 0; l < stride; l += kQuantisedGroup) {
      VecI32 largest = {};
      for (int v = 0; v < kVectors; ++v) {
        const VecI32 size = reinterpret_cast<VecI32>(load(x + l + v * w)) & 0x7fffffff;
        largest = size > largest ? size : largest;
      }
      std::int32_t most = 0;
      for (int i = 0; i < w; ++i) most = std::max(most, largest[i]);
      // The exponent of a power of two above it. What is not finite makes the group NaN, as its products are.
      const std::int32_t exponent = std::max(most >> 23, 13);
      const bool finite = exponent < 255;
      const VecF factor = broadcast(finite ? from_bits((266 - exponent) << 23) : 0.0f);
      VecI32 sum = {};
      for (int v = 0; v < kVectors; ++v) {
        // Sums with 1.5 * 2^23 have the rounded integer in their last bits.
        constexpr float kInteger = 12582912.0f;
        VecI32 q = {};
        if (finite) q = reinterpret_cast<VecI32>(load(x + l + v * w) * factor + kInteger) - 0x4b400000;
        sum += q;
        const VecI32 high = (q + 64) >> 7, low = (q - (high << 7)) & 255;
        const VecI32 part = high & 255;
        // In every four lanes: high, high, low, low of rows 0 and 1, and of rows 2 and 3.
        const VecI32 first = shuffle(part, low, [](int i) { return i / 4 * 4 + i % 2 + (i % 4 < 2 ? 0 : w); });
        const VecI32 second = shuffle(part, low, [](int i) { return i / 4 * 4 + 2 + i % 2 + (i % 4 < 2 ? 0 : w); });
        const VecI32 pair = first | second << 8;
        const VecI32 next = shuffle(pair, pair, [](int i) { return (i + 4) % w; });
        store_raw(words + row * stride + l + v * w, pair | (kBytesInWord == 4 ? next : pair) << 16);
      }
      std::int32_t total = 0;
      for (int i = 0; i < w; ++i) total += sum[i];
      const std::int64_t group = row * (stride / kQuantisedGroup) + l / kQuantisedGroup;
      scales[group] = from_bits(finite ? (exponent - 12) << 23 : 0x7fc00000);
      rests[group] = 8 * total;
    }
  }

 private:
  static float from_bits(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void store_raw(std::int32_t* to, VecI32 v) { std::memcpy(to, &v, sizeof v); }
};
static_assert(kQuantisedGroup == 32);

#if defined(MFX_ISA_AVX512) || defined(MFX_ISA_AVX2)
// y[r, c] = sum over l of x[r, l] W[l, c], for kRows rows of x and the panel's 64 columns.
template <int kRows>
inline void multiply_panel_bytes(PanelReader<4> panel, std::int64_t depth, const ByteRows& x,
                                 const std::int64_t (&rows)[kRows], float* y) {
  constexpr int w = kWidth<float>;
  float sums[kRows][kPanel] = {};  // in their own order
  const std::int64_t groups = x.stride / kQuantisedGroup, used = (depth + kQuantisedGroup - 1) / kQuantisedGroup;
  for (std::int64_t group = 0; group < used; ++group) {
    const PanelReader<4> part = panel.at(group * kQuantisedGroup);
    const std::int32_t* words[kRows];
    for (int r = 0; r < kRows; ++r) words[r] = x.words + rows[r] * x.stride + group * kQuantisedGroup;
    for (int c = 0; c < kPanel; c += kVectorBytes) {
      VecI32 found[kRows][4];
      sum_group(part.values + c, words, found);
      VecF in_order[4], scale[4];
      for (int k = 0; k < 4; ++k) in_order[k] = load(part.scales + c + k * w);
      order_as_sums(in_order, scale);
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t own = rows[r] * groups + group;
        for (int k = 0; k < 4; ++k) {
          float* const to = sums[r] + c + k * w;
          const VecF product = to_floats(found[r][k] - x.rests[own]) * x.scales[own];
          store(to, load(to) + product * scale[k]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (std::int64_t i = 0; i < kPanel; ++i) y[r * kPanel + column_of_sum(i)] = sums[r][i];
  }
}

// The same for the rows at any number of positions, y [rows, kPanel].
template <typename RowAt>
inline void multiply_panel_bytes(PanelReader<4> panel, std::int64_t depth, std::int64_t rows, const ByteRows& x,
                                 RowAt row_at, float* y) {
  std::int64_t r = 0;
  const auto multiply = [&]<int kRows>() {
    for (; r + kRows <= rows; r += kRows) {
      std::int64_t own[kRows];
      for (int i = 0; i < kRows; ++i) own[i] = row_at(r + i);
      multiply_panel_bytes<kRows>(panel, depth, x, own, y + r * kPanel);
    }
  };
  if constexpr (kVectorRegisters == 32) multiply.template operator()<4>();
  multiply.template operator()<2>();
  multiply.template operator()<1>();
}
#endif

}  // namespace mfx::MFX_ISA
