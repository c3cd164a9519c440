// Operand packing: rows found through the layout, converted to the operand type, zero-padded, in the order that
// core/tile_gemm.hpp multiplies. A block of 16 x 16 (a vector squared) is transposed in registers where needed.
#pragma once

#include <algorithm>

#include "core/simd.hpp"
#include "moduleformer_ext/grouped_gemm.hpp"

namespace mfx::MFX_ISA {

inline constexpr int kPanel = 64;  // columns of a packed B panel: the most a bf16 product takes

// Rows of B that are interleaved: bf16 products take pairs.
template <typename Op>
inline constexpr int kInterleave = std::is_same_v<Op, BFloat16> ? 2 : 1;

inline std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Position -> row, whatever order the rows are stored in.
template <typename T>
class RowReader {
 public:
  RowReader(const RoutedRows& rows, const RoutedLayout& layout)
      : data_(static_cast<const T*>(rows.data)),
        order_(rows.order),
        stride_(rows.stride),
        choice_stride_(rows.choice_stride),
        slot_order_(layout.slot_order),
        choices_(static_cast<std::int32_t>(layout.num_choices)) {}

  const T* operator()(std::int64_t position) const {
    if (order_ == RowOrder::kExpert) return data_ + position * stride_;
    const std::int32_t slot = slot_order_[position];
    const std::int32_t token = slot / choices_;
    const std::int64_t choice = order_ == RowOrder::kSlot ? slot - token * choices_ : 0;
    return data_ + token * stride_ + choice * choice_stride_;
  }

 private:
  const T* data_;
  RowOrder order_;
  std::int64_t stride_, choice_stride_;
  const std::int32_t* slot_order_;
  std::int32_t choices_;
};

// Up to a vector's lanes of a row of n elements, from column c on; zeros beyond the row.
template <typename T>
inline Vec<Accumulate<T>> load_columns(const T* row, std::int64_t c, std::int64_t n) {
  constexpr int w = kWidth<Accumulate<T>>;
  if (c + w <= n) return load(row + c);
  return c < n ? load_partial(row + c, static_cast<int>(n - c)) : Vec<Accumulate<T>>{};
}
template <typename T>
inline void store_columns(T* row, std::int64_t c, std::int64_t n, Vec<Accumulate<T>> v) {
  constexpr int w = kWidth<Accumulate<T>>;
  if (c + w <= n) {
    store(row + c, v);
  } else if (c < n) {
    store_partial(row + c, v, static_cast<int>(n - c));
  }
}

// A row as operands: n elements of T, zeros up to n_padded. T is not wider than Op.
template <typename T, typename Op>
inline void pack_row(const T* row, std::int64_t n, std::int64_t n_padded, Op* out) {
  if constexpr (std::is_same_v<T, Op>) {
    std::memcpy(out, row, static_cast<std::size_t>(n) * sizeof(T));
  } else {
    constexpr int w = kWidth<Accumulate<T>>;
    for (std::int64_t c = 0; c < n; c += w) store_columns(out, c, n, load_columns(row, c, n));
  }
  for (std::int64_t c = n; c < n_padded; ++c) out[c] = Op{};
}

// Two rows as the pairs of a bf16 product; a null row is zeros. Only the first `columns` are read.
inline void pack_pairs(const BFloat16* even, const BFloat16* odd, int columns, int width, BFloat16* out) {
  constexpr int w = kWidth<float>;
  BFloat16 even_tail[kPanel] = {}, odd_tail[kPanel] = {};
  if (columns < width || even == nullptr || odd == nullptr) {
    const auto bytes = static_cast<std::size_t>(columns) * sizeof(BFloat16);
    if (even != nullptr) std::memcpy(even_tail, even, bytes);
    if (odd != nullptr) std::memcpy(odd_tail, odd, bytes);
    even = even_tail, odd = odd_tail;
  }
  for (int c = 0; c < width; c += w) {
    const VecU32 pairs = interleave_halves(even + c, odd + c);
    std::memcpy(out + 2 * c, &pairs, sizeof pairs);
  }
}

// B panel from rows in place: k rows (of k_padded) x `columns` (of kPanel; written up to `width`, a multiple of 16).
// row(l) gives a pointer to the panel's first column of row l.
template <typename T, typename Op, typename Row>
inline void pack_panel(Row row, std::int64_t k, std::int64_t k_padded, int columns, int width, Op* out) {
  if constexpr (kInterleave<Op> == 2) {
    constexpr int w = kWidth<float>;
    std::int64_t l = 0;
    if (columns == kPanel) {
      for (; l + 2 <= k; l += 2, out += 2 * kPanel) {
        const BFloat16 *even = row(l), *odd = row(l + 1);
        for (int c = 0; c < kPanel; c += w) {
          const VecU32 pairs = interleave_halves(even + c, odd + c);
          std::memcpy(out + 2 * c, &pairs, sizeof pairs);
        }
      }
    }
    for (; l < k_padded; l += 2, out += 2 * kPanel) {
      pack_pairs(l < k ? row(l) : nullptr, l + 1 < k ? row(l + 1) : nullptr, columns, width, out);
    }
  } else {
    constexpr int w = kWidth<Accumulate<T>>;
    for (std::int64_t l = 0; l < k; ++l, out += kPanel) {
      const T* source = row(l);
      if (columns == kPanel) {
        for (int c = 0; c < kPanel; c += w) store(out + c, load(source + c));
      } else {
        for (int c = 0; c < width; c += w) store(out + c, load_columns(source, c, columns));
      }
    }
    std::fill_n(out, (k_padded - k) * kPanel, Op{});
  }
}

// Columns as rows: out[c * stride + s] = scale(s) * row(s)[c], for s in [0, rows), zeros up to rows_padded (a
// multiple of 16), for c in [0, columns).
template <typename T, typename Op, typename Row, typename Scale>
inline void pack_transposed(Row row, Scale scale, std::int64_t rows, std::int64_t rows_padded, std::int64_t columns,
                            Op* out, std::int64_t stride) {
  using V = Vec<Accumulate<T>>;
  constexpr int w = kWidth<Accumulate<T>>;
  for (std::int64_t s = 0; s < rows_padded; s += w) {
    const T* source[w];
    Accumulate<T> factor[w];
    for (int i = 0; i < w; ++i) {
      source[i] = s + i < rows ? row(s + i) : nullptr;
      factor[i] = s + i < rows ? scale(s + i) : Accumulate<T>(0);
    }
    for (std::int64_t c = 0; c < columns; c += w) {
      V r[w];
      for (int i = 0; i < w; ++i) r[i] = source[i] ? factor[i] * load_columns(source[i], c, columns) : V{};
      transpose<Accumulate<T>>(r);
      const int used = static_cast<int>(std::min<std::int64_t>(w, columns - c));
      for (int i = 0; i < used; ++i) store(out + (c + i) * stride + s, r[i]);
    }
  }
}

// The same with pairs of columns interleaved, unscaled: out[(c / 2) * 2 * stride + 2 * s + c % 2], an odd last column
// paired with zeros.
template <typename Row>
inline void pack_transposed_pairs(Row row, std::int64_t rows, std::int64_t rows_padded, std::int64_t columns,
                                  BFloat16* out, std::int64_t stride) {
  constexpr int w = kWidth<float>;
  const std::int64_t pairs = (columns + 1) / 2;
  for (std::int64_t s = 0; s < rows_padded; s += w) {
    const BFloat16* source[w];
    for (int i = 0; i < w; ++i) source[i] = s + i < rows ? row(s + i) : nullptr;
    for (std::int64_t c = 0; c < pairs; c += w) {
      VecU32 r[w];
      for (int i = 0; i < w; ++i) {
        r[i] = VecU32{};
        if (source[i] == nullptr) continue;
        const std::int64_t left = std::min<std::int64_t>(2 * w, columns - 2 * c);
        std::memcpy(&r[i], source[i] + 2 * c, static_cast<std::size_t>(left) * sizeof(BFloat16));
      }
      transpose<std::uint32_t>(r);
      const int used = static_cast<int>(std::min<std::int64_t>(w, pairs - c));
      for (int i = 0; i < used; ++i) std::memcpy(out + 2 * ((c + i) * stride + s), &r[i], sizeof r[i]);
    }
  }
}

}  // namespace mfx::MFX_ISA
