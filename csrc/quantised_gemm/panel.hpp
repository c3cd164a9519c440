// A panel of 64 columns of a quantised matrix, read from end to end: multiplied as it lies, or turned into the operands
// of core/tile_gemm.hpp.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/prefetch.hpp"
#include "core/simd.hpp"
#include "grouped_gemm/pack.hpp"
#include "moduleformer_ext/quantised_gemm.hpp"

namespace mfx::MFX_ISA {

static_assert(kPanel == kQuantisedPanel);

template <int kBits>
struct PanelReader {
  static constexpr int kNumbers = 8 / kBits;  // rows in a row of bytes
  using Scale = std::conditional_t<kBits == 8, float, Float16>;

  const std::int8_t* values;
  const Scale* scales;

  // From row l on, the first of a group.
  PanelReader at(std::int64_t l) const {
    return {values + l / kNumbers * kPanel, kBits == 8 ? scales : scales + l / kQuantisedGroup * kPanel};
  }
  // Rows that share a scale.
  static std::int64_t group(std::int64_t depth) { return kBits == 8 ? depth : kQuantisedGroup; }
};

inline VecF to_floats(VecI32 v) {
  return __builtin_convertvector(v, VecF);
}

// A vector's lanes of the numbers in a row of bytes.
template <int kBits>
inline void load_numbers(const std::int8_t* bytes, VecF (&rows)[8 / kBits]) {
  const VecI32 wide = load_bytes(bytes);
  if constexpr (kBits == 8) {
    rows[0] = to_floats(wide);
  } else {
    rows[0] = to_floats((wide & 15) - 8);
    rows[1] = to_floats(wide >> 4);
  }
}

// What a product with few rows multiplies. A byte b of two numbers, b = 16 n1 + u with u = n0 + 8, is not taken apart
// further than it must be:
//
//   x0 n0 + x1 n1 = (x0 - x1 / 16) u + (x1 / 16) b - 8 x0
//
// The terms are u and b. Their factors in brackets are made of x once (make_factors), and what is left is summed over a
// few rows and taken from the sum before them: over more, the sums in between would be larger than they are without.
template <int kBits>
inline void load_terms(const std::int8_t* bytes, VecF (&terms)[8 / kBits]) {
  const VecI32 wide = load_bytes(bytes);
  terms[0] = to_floats(kBits == 8 ? wide : wide & 15);
  if constexpr (kBits == 4) terms[1] = to_floats(wide);
}

inline constexpr std::int64_t kRestRows = 8;
static_assert(kQuantisedGroup % kRestRows == 0);

// Rows of x as factors of the terms.
struct PanelRows {
  const float* factors;  // [rows, stride], zeros beyond the depth
  std::int64_t stride;
  const float* rests;              // 4 bits: [rows, stride / kRestRows], 8 x0 summed over so many rows of the matrix
  const std::int32_t* slot_order;  // where several positions share a row; or null
  std::int32_t slots_per_row;

  std::int64_t row(std::int64_t position) const {
    return slot_order == nullptr ? position : slot_order[position] / slots_per_row;
  }
};

// 4 bits: turns a row of x, zeros up to whole groups, into factors in place, and writes its rests.
inline void make_factors(float* x, std::int64_t stride, float* rests) {
  for (std::int64_t l = 0; l < stride; l += kRestRows) {
    float sum = 0.0f;
    for (std::int64_t i = l; i < l + kRestRows; i += 2) {
      sum += x[i];
      x[i + 1] *= 0.0625f;
      x[i] -= x[i + 1];
    }
    rests[l / kRestRows] = 8.0f * sum;
  }
}

inline constexpr std::int64_t kPanelBytesAhead = 8192;  // prefetched: two pages, of which hardware sees one at a time

// y[r, c] = sum over l of x[r, l] W[l, c], for the rows at kRows positions and the panel's 64 columns.
template <int kBits, int kRows>
inline void multiply_panel_rows(PanelReader<kBits> panel, std::int64_t depth, const PanelRows& x, std::int64_t position,
                                float* y) {
  constexpr int w = kWidth<float>, kNumbers = PanelReader<kBits>::kNumbers;
  constexpr int kVectors = std::min(kPanel / w, kVectorRegisters / 2 / kRows);  // sums fill half of the registers
  const float* factors[kRows];
  const float* rests[kRows];
  for (int r = 0; r < kRows; ++r) {
    std::fill_n(y + r * kPanel, kPanel, 0.0f);
    const std::int64_t row = x.row(position + r);
    factors[r] = x.factors + row * x.stride;
    rests[r] = x.rests + row * (x.stride / kRestRows);
  }
  const std::int64_t group = panel.group(depth);
  for (std::int64_t first = 0; first < depth; first += group) {
    const std::int64_t end = std::min(depth, first + group);
    const PanelReader<kBits> part = panel.at(first);
    for (int c = 0; c < kPanel; c += kVectors * w) {
      VecF sum[kRows][kVectors] = {};
      const std::int8_t* bytes = part.values + c;
      const auto add_row = [&](std::int64_t l) {
        prefetch_far(bytes + kPanelBytesAhead);
        for (int v = 0; v < kVectors; ++v) {
          VecF terms[kNumbers];
          load_terms<kBits>(bytes + v * w, terms);
          for (int i = 0; i < kNumbers; ++i) {
            for (int r = 0; r < kRows; ++r) sum[r][v] += factors[r][l + i] * terms[i];
          }
        }
        bytes += kPanel;
      };
      if constexpr (kBits == 8) {
        for (std::int64_t l = first; l < end; ++l) add_row(l);
      } else {
        for (std::int64_t l = first; l < end; l += kRestRows) {
          for (int r = 0; r < kRows; ++r) {
            const float rest = rests[r][l / kRestRows];
            for (int v = 0; v < kVectors; ++v) sum[r][v] -= rest;
          }
          for (std::int64_t i = l; i < l + kRestRows; i += kNumbers) add_row(i);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const VecF scale = load(part.scales + c + v * w);
        for (int r = 0; r < kRows; ++r) {
          float* const to = y + r * kPanel + c + v * w;
          store(to, load(to) + sum[r][v] * scale);
        }
      }
    }
  }
}

// The same for any number of rows, y [rows, kPanel].
template <int kBits>
inline void multiply_panel(PanelReader<kBits> panel, std::int64_t depth, std::int64_t rows, const PanelRows& x,
                           std::int64_t position, float* y) {
  std::int64_t r = 0;
  const auto multiply = [&]<int kRows>() {
    for (; r + kRows <= rows; r += kRows) {
      multiply_panel_rows<kBits, kRows>(panel, depth, x, position + r, y + r * kPanel);
    }
  };
  multiply.template operator()<4>();
  multiply.template operator()<2>();
  multiply.template operator()<1>();
}

// Rows [first, first + rows) of the panel as a B operand [rows, kPanel], up to `rows_padded` with zeros. `first` begins
// a group.
template <int kBits, typename Op>
inline void dequantise_panel(PanelReader<kBits> panel, std::int64_t first, std::int64_t rows, std::int64_t rows_padded,
                             Op* out) {
  constexpr int w = kWidth<float>, kNumbers = PanelReader<kBits>::kNumbers;
  const PanelReader<kBits> part = panel.at(first);
  const std::int64_t group = panel.group(rows);
  // Two rows at a time, as bytes of 4-bit numbers and pairs of a bf16 product hold them.
  for (std::int64_t l = 0; l < rows; l += 2) {
    const auto* const scales = part.scales + l / group * kPanel;
    const std::int8_t* const bytes = part.values + l / kNumbers * kPanel;
    for (int c = 0; c < kPanel; c += w) {
      const VecF scale = load(scales + c);
      VecF row[2] = {};
      if constexpr (kNumbers == 2) {
        load_numbers<kBits>(bytes + c, row);
      } else {
        VecF number[1];
        for (int i = 0; i < 2 && l + i < rows; ++i) {
          load_numbers<kBits>(bytes + i * kPanel + c, number);
          row[i] = number[0];
        }
      }
      if constexpr (kInterleave<Op> == 2) {
        const VecU32 pairs = interleave_bf16(scale * row[0], scale * row[1]);
        std::memcpy(out + l * kPanel + 2 * c, &pairs, sizeof pairs);
      } else {
        store(out + l * kPanel + c, scale * row[0]);
        if (l + 1 < rows) store(out + (l + 1) * kPanel + c, scale * row[1]);
      }
    }
  }
  const std::int64_t written = round_up(rows, kInterleave<Op>);
  if (written < rows_padded) std::fill_n(out + written * kPanel, (rows_padded - written) * kPanel, Op{});
}

}  // namespace mfx::MFX_ISA
