// Keys and rows that hold NaN or infinity. A tile product multiplies every key with every row, and 0 * NaN is NaN: such
// a key would reach rows that do not see it, though its weight there is 0. So packing puts zeros in its place, and what
// it adds to those that do see it is added apart, after the product.
#pragma once

#include <bit>

#include "stick_attention/stick_tiles.hpp"

namespace mfx::MFX_ISA {

// A bit for each of `count` <= 64 rows of head_dim values: whether one of them is not finite. row(i) is a pointer.
template <typename Row>
inline std::uint64_t non_finite_rows(std::int64_t count, std::int64_t head_dim, Row&& row) {
  using T = std::remove_cvref_t<decltype(*row(0))>;
  using V = Vec<Accumulate<T>>;
  constexpr int w = kWidth<Accumulate<T>>;
  const auto finite = [&](std::int64_t begin, std::int64_t end) {
    V zero{};  // NaN once something is not finite
    for (std::int64_t i = begin; i < end; ++i) {
      V first{}, second{};  // of this row: one chain of sums over all would wait for itself
      std::int64_t d = 0;
      for (; d + 2 * w <= head_dim; d += 2 * w) {
        const auto pair = load_pair(row(i) + d);
        first += pair.first * Accumulate<T>(0);
        second += pair.second * Accumulate<T>(0);
      }
      for (; d < head_dim; d += w) {
        first +=
            load_lanes_of(row(i) + d, static_cast<int>(std::min<std::int64_t>(w, head_dim - d))) * Accumulate<T>(0);
      }
      zero += first + second;
    }
    return reduce_add(zero) == 0;
  };
  std::uint64_t rows = 0;
  if (finite(0, count)) return rows;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!finite(i, i + 1)) rows |= std::uint64_t{1} << i;
  }
  return rows;
}

// Packs the finite ones of keys [first, first + 64), and says which are left out.
template <typename Op, typename T>
inline std::uint64_t pack_finite_keys(const StickKeys<const T>& keys, std::int64_t first, std::int64_t head_dim,
                                      Op* out) {
  const std::uint64_t left_out = non_finite_rows(std::min(kTileKeys, keys.count - first), head_dim,
                                                 [&](std::int64_t key) { return keys[first + key]; });
  pack_keys_transposed(keys, first, left_out, head_dim, out);
  return left_out;
}

// Packs the finite ones of a query tile's rows, and says which are left out.
template <typename Op, typename T>
inline std::uint64_t pack_finite_rows(const StickRows<const T>& rows, std::int64_t head_dim, std::int64_t tile_rows,
                                      std::int64_t ld, Op* out) {
  const std::uint64_t left_out = non_finite_rows(rows.count, head_dim, [&](std::int64_t row) { return rows[row]; });
  pack_rows(rows, left_out, head_dim, tile_rows, ld, out);
  return left_out;
}

template <typename T>
inline Accumulate<T> widen(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

// at(target, d) += factor(i, target) * row(i)[d] for every i in `rows` and every target < targets with sees(i, target).
template <typename Row, typename Sees, typename Factor, typename At>
inline void add_non_finite(std::uint64_t rows, Row&& row, std::int64_t targets, std::int64_t head_dim, Sees&& sees,
                           Factor&& factor, At&& at) {
  for (; rows != 0; rows &= rows - 1) {
    const int i = std::countr_zero(rows);
    for (std::int64_t target = 0; target < targets; ++target) {
      if (!sees(i, target)) continue;
      const auto scale = widen(factor(i, target));
      for (std::int64_t d = 0; d < head_dim; ++d) at(target, d) += scale * widen(row(i)[d]);
    }
  }
}

}  // namespace mfx::MFX_ISA
