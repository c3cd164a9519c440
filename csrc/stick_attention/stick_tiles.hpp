// Geometry and packing of stick attention's tiles, shared by forward and backward.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/divide.hpp"
#include "core/dtype_of.hpp"
#include "core/parallel.hpp"
#include "core/simd.hpp"
#include "core/tile_gemm.hpp"
#include "moduleformer_ext/stick_attention.hpp"

namespace mfx::MFX_ISA {

inline constexpr std::int64_t kTileKeys = 64;
inline constexpr std::int64_t kMostTileRows = 64;
inline constexpr std::int64_t kWideHead = 256;  // from here on a tile of 64 rows outgrows the L2 cache

// One sequence of the batch. A row is (query position, group): row = position * G + g.
struct StickSequence {
  std::int64_t batch, q_begin, k_begin, keys, rows;
  std::int64_t history;  // keys older than the first query
};

// A tile of query rows of one sequence and K/V head.
struct StickQueryTile {
  std::int64_t sequence, head, first_row;
};

class StickGeometry {
 public:
  explicit StickGeometry(const StickAttentionProblem& p) : problem(p) {
    const bool packed = p.cu_seqlens_q != nullptr;
    std::int64_t most_rows = 0;
    for (std::int64_t i = 0; i < p.sequences; ++i) {
      StickSequence s{};
      s.batch = packed ? 0 : i;
      s.keys = p.tokens_k;
      s.rows = p.tokens_q;
      if (packed) {
        s.q_begin = p.cu_seqlens_q[i];
        s.k_begin = p.cu_seqlens_k[i];
        s.rows = p.cu_seqlens_q[i + 1] - s.q_begin;
        s.keys = p.cu_seqlens_k[i + 1] - s.k_begin;
      }
      s.history = s.keys - s.rows;
      s.rows *= p.group;
      most_rows = std::max(most_rows, s.rows);
      sequences.push_back(s);
    }
    const std::int64_t widest = p.head_dim > kWideHead ? 32 : kMostTileRows;
    tile_rows = std::min<std::int64_t>(widest, most_rows <= 16 ? 16 : most_rows <= 32 ? 32 : 64);
  }

  // Newest key that a row sees; negative if none.
  std::int64_t newest_key(const StickSequence& s, std::int64_t row) const {
    return s.history + row / problem.group - (problem.attend_current ? 0 : 1);
  }

  // newest[row] = the newest key that row first_row + row sees, counted from `first_key`; a row that is not there sees
  // none.
  template <typename Real>
  void newest_keys(const StickSequence& s, std::int64_t first_row, std::int64_t first_key, Real* newest) const {
    std::int64_t group = first_row % problem.group, key = newest_key(s, first_row) - first_key;
    for (std::int64_t row = 0; row < tile_rows; ++row) {
      newest[row] = static_cast<Real>(first_row + row < s.rows ? key : -1);
      if (++group < problem.group) continue;
      group = 0;
      ++key;
    }
  }

  std::int64_t key_tiles(const StickSequence& s) const { return ceil_div(s.keys, kTileKeys); }

  // Index of row (in sequence) of a head in [B, Tq, H, G].
  std::int64_t flat_row(const StickQueryTile& t, std::int64_t row) const {
    const StickSequence& s = sequences[t.sequence];
    const std::int64_t token = s.batch * problem.tokens_q + s.q_begin + row / problem.group;
    return (token * problem.heads + t.head) * problem.group + row % problem.group;
  }

  const StickAttentionProblem& problem;
  std::vector<StickSequence> sequences;
  std::int64_t tile_rows;  // rows per query tile
};

// The rows of one query tile in a tensor of q's shape.
template <typename T>
class StickRows {
 public:
  std::int64_t count;

  StickRows(TensorPointer<T> tensor, const StickQueryStrides& strides, const StickGeometry& g,
            const StickQueryTile& t) {
    const StickSequence& s = g.sequences[t.sequence];
    count = std::min(g.tile_rows, s.rows - t.first_row);
    std::int64_t group = t.first_row % g.problem.group;
    T* token = static_cast<T*>(tensor) + s.batch * strides.batch + t.head * strides.head +
               (s.q_begin + t.first_row / g.problem.group) * strides.token;
    for (std::int64_t row = 0; row < count; ++row) {
      rows_[row] = token + group * strides.group;
      if (++group < g.problem.group) continue;
      group = 0;
      token += strides.token;
    }
  }
  T* operator[](std::int64_t row) const { return rows_[row]; }

 private:
  T* rows_[kMostTileRows];
};

// The keys of one sequence and head.
template <typename T>
struct StickKeys {
  T* base;
  std::int64_t stride, count;

  StickKeys(TensorPointer<T> tensor, const StickKeyStrides& strides, const StickGeometry& g, std::int64_t sequence,
            std::int64_t head)
      : stride(strides.token), count(g.sequences[sequence].keys) {
    const StickSequence& s = g.sequences[sequence];
    base = static_cast<T*>(tensor) + s.batch * strides.batch + s.k_begin * strides.token + head * strides.head;
  }
  T* operator[](std::int64_t key) const { return base + key * stride; }
};

// Which keys of a tile take part: all (null), or a byte per key.
class StickKeep {
 public:
  StickKeep(const StickGeometry& g, std::int64_t sequence)
      : keys_(g.sequences[sequence].keys),
        mask_(g.problem.key_padding_mask == nullptr
                  ? nullptr
                  : g.problem.key_padding_mask + g.sequences[sequence].batch * g.problem.tokens_k) {}

  // False when no key of [first, first + keys) takes part; else `bytes` holds or is what StickTile::keep wants.
  bool tile(std::int64_t first, std::int64_t keys, std::uint8_t* bytes, const std::uint8_t** keep) const {
    *keep = nullptr;
    if (mask_ == nullptr) return true;
    const std::int64_t here = std::min(keys, keys_ - first);
    std::int64_t kept = 0;
    for (std::int64_t j = 0; j < keys; ++j) {
      bytes[j] = j < here && mask_[first + j];
      kept += bytes[j];
    }
    if (kept < keys) *keep = bytes;
    return kept > 0;
  }

 private:
  std::int64_t keys_;
  const bool* mask_;
};

// What the rows of a query tile see, one tile of keys after the other.
class StickSight {
 public:
  StickSight(const StickGeometry& g, const StickQueryTile& t)
      : g_(g),
        sequence_(g.sequences[t.sequence]),
        first_row_(t.first_row),
        rows_(std::min(g.tile_rows, sequence_.rows - t.first_row)),
        oldest_(g.newest_key(sequence_, t.first_row)),
        newest_(g.newest_key(sequence_, t.first_row + rows_ - 1)),
        mask_(g, t.sequence) {}

  StickSight(const StickSight&) = delete;
  StickSight& operator=(const StickSight&) = delete;

  // Tiles up to the newest key that a row sees.
  std::int64_t key_tiles() const { return newest_ < 0 ? 0 : newest_ / kTileKeys + 1; }

  // Turns to a tile of keys; false when none of them takes part.
  bool turn_to(std::int64_t tile) {
    first = tile * kTileKeys;
    keys = std::min(kTileKeys, round_up(newest_ - first + 1, 16));
    return mask_.tile(first, keys, bytes_, &keep);
  }

  bool all_rows_there() const { return rows_ == g_.tile_rows; }

  // StickTile::newest: null where every row sees all keys of the tile, unless asked for `in_any_case`.
  template <typename Real>
  const Real* newest_keys(Real* newest, bool in_any_case = false) const {
    if (first + keys - 1 <= oldest_ && !in_any_case) return nullptr;
    g_.newest_keys(sequence_, first_row_, first, newest);
    return newest;
  }

  // Whether a row, which is there, sees a key of the tile.
  bool sees(std::int64_t row, std::int64_t key) const {
    return (keep == nullptr || keep[key]) && first + key <= g_.newest_key(sequence_, first_row_ + row);
  }

  std::int64_t first = 0, keys = 0;  // of the tile; keys is a multiple of 16
  const std::uint8_t* keep = nullptr;

 private:
  const StickGeometry& g_;
  const StickSequence& sequence_;
  std::int64_t first_row_, rows_;
  std::int64_t oldest_, newest_;  // the newest key that the first row sees, and the last
  StickKeep mask_;
  std::uint8_t bytes_[kTileKeys];
};

// ---- Packing. Op is the products' operand type: the storage type itself, or the accumulation type. ----

// Words are what a transposition moves: values of the accumulation type, or pairs of bf16 values in float's clothes.

// Transposes a matrix of words, [rows, columns] to [columns, rows_out >= rows]: load(row, column, n) gives n words of a
// row as a vector, and take(column, row, vector, n) gets n words of a column.
template <typename Real, typename Load, typename Take>
inline void transpose_words(std::int64_t rows, std::int64_t columns, Load&& load, Take&& take) {
  constexpr int w = kWidth<Real>;
  for (std::int64_t r = 0; r < rows; r += w) {
    const int height = static_cast<int>(std::min<std::int64_t>(w, rows - r));
    for (std::int64_t c = 0; c < columns; c += w) {
      const int width = static_cast<int>(std::min<std::int64_t>(w, columns - c));
      Vec<Real> block[w];
      for (int i = 0; i < w; ++i) block[i] = i < height ? load(r + i, c, width) : Vec<Real>{};
      transpose<Real>(block);
      for (int i = 0; i < width; ++i) take(c + i, r, block[i], height);
    }
  }
}

inline VecU32 load_pairs(const BFloat16* p, int pairs) {
  if (pairs == kWidth<float>) return load_raw<VecU32>(p);
  std::uint32_t words[kWidth<float>] = {};
  std::memcpy(words, p, static_cast<std::size_t>(pairs) * 4);
  return load_raw<VecU32>(words);
}
inline VecU32 load_bits(const BFloat16* p, int n) {
  if (n == kWidth<float>) return widen_u16(load_raw<VecU16>(p));
  std::uint16_t words[kWidth<float>] = {};
  std::memcpy(words, p, static_cast<std::size_t>(n) * 2);
  return widen_u16(load_raw<VecU16>(words));
}

// Query-shaped rows as B operand [D, tile_rows] (for bf16 in VNNI pairs along D); rows that are not there are zero.
template <typename Op, typename T>
inline void pack_rows_transposed(const StickRows<const T>& rows, std::int64_t head_dim, std::int64_t tile_rows,
                                 Op* out) {
  if constexpr (std::is_same_v<Op, BFloat16>) {
    transpose_words<float>(
        tile_rows, head_dim / 2,
        [&](std::int64_t row, std::int64_t pair, int n) {
          return row < rows.count ? reinterpret_cast<VecF>(load_pairs(rows[row] + 2 * pair, n)) : VecF{};
        },
        [&](std::int64_t pair, std::int64_t row, VecF words, int) {
          std::memcpy(out + 2 * (pair * tile_rows + row), &words, sizeof words);
        });
  } else {
    transpose_words<Op>(
        tile_rows, head_dim,
        [&](std::int64_t row, std::int64_t d, int n) {
          return row < rows.count ? load_lanes_of(rows[row] + d, n) : Vec<Op>{};
        },
        [&](std::int64_t d, std::int64_t row, Vec<Op> words, int) { store(out + d * tile_rows + row, words); });
  }
}

// The lowest n <= 64 bits.
inline std::uint64_t first_bits(std::int64_t n) {
  return n < 64 ? (std::uint64_t{1} << n) - 1 : ~std::uint64_t{0};
}

// Query-shaped rows as B operand [tile_rows, ld] (for bf16 in VNNI pairs of rows), zero from head_dim and count on, and
// for the rows whose bit is in `leave_out`.
template <typename Op, typename T>
inline void pack_rows(const StickRows<const T>& rows, std::uint64_t leave_out, std::int64_t head_dim,
                      std::int64_t tile_rows, std::int64_t ld, Op* out) {
  const auto taken = [&](std::int64_t row) {
    return row < rows.count && !(leave_out >> row & 1) ? rows[row] : nullptr;
  };
  constexpr int w = kWidth<Accumulate<T>>;
  for (std::int64_t row = 0; row < tile_rows; row += 2) {
    const T *const even = taken(row), *const odd = taken(row + 1);
    for (std::int64_t d = 0; d < ld; d += w) {
      const int n = static_cast<int>(std::clamp<std::int64_t>(head_dim - d, 0, w));
      if constexpr (std::is_same_v<Op, BFloat16>) {
        VecU32 pair{};
        if (even != nullptr) pair = load_bits(even + d, n);
        if (odd != nullptr) pair |= load_bits(odd + d, n) << 16;
        std::memcpy(out + row * ld + 2 * d, &pair, sizeof pair);
      } else {
        store(out + row * ld + d, even != nullptr ? load_lanes_of(even + d, n) : Vec<Op>{});
        store(out + (row + 1) * ld + d, odd != nullptr ? load_lanes_of(odd + d, n) : Vec<Op>{});
      }
    }
  }
}

// Keys [first, first + 64) as A operand [D, 64]; zero for keys that are not there or whose bit is in `leave_out`.
template <typename Op, typename T>
inline void pack_keys_transposed(const StickKeys<const T>& keys, std::int64_t first, std::uint64_t leave_out,
                                 std::int64_t head_dim, Op* out) {
  const std::int64_t here = std::min(kTileKeys, keys.count - first);
  const std::uint64_t taken = first_bits(here) & ~leave_out;
  if constexpr (std::is_same_v<Op, BFloat16>) {
    transpose_words<float>(
        kTileKeys / 2, head_dim,
        [&](std::int64_t pair, std::int64_t d, int n) {
          VecU32 words{};
          if (taken >> (2 * pair) & 1) words = load_bits(keys[first + 2 * pair] + d, n);
          if (taken >> (2 * pair + 1) & 1) words |= load_bits(keys[first + 2 * pair + 1] + d, n) << 16;
          return reinterpret_cast<VecF>(words);
        },
        [&](std::int64_t d, std::int64_t pair, VecF words, int) {
          std::memcpy(out + d * kTileKeys + 2 * pair, &words, sizeof words);
        });
  } else {
    transpose_words<Op>(
        kTileKeys, head_dim,
        [&](std::int64_t key, std::int64_t d, int n) {
          return taken >> key & 1 ? load_lanes_of(keys[first + key] + d, n) : Vec<Op>{};
        },
        [&](std::int64_t d, std::int64_t key, Vec<Op> words, int) { store(out + d * kTileKeys + key, words); });
  }
}

template <typename Op>
struct OperandA {
  const Op* data;
  std::int64_t ld;
};

// `count` keys from `first` on as A operand [count, D]: in place where they are all there in the operand type, else
// widened or completed with zeros in scratch.
template <typename Op, typename T>
inline OperandA<Op> row_operand(const StickKeys<const T>& keys, std::int64_t first, std::int64_t count,
                                std::int64_t head_dim, Op* scratch) {
  const std::int64_t here = std::min(count, keys.count - first);
  if constexpr (std::is_same_v<Op, T>) {
    if (here == count) return {keys[first], keys.stride};
    for (std::int64_t j = 0; j < here; ++j) std::copy_n(keys[first + j], head_dim, scratch + j * head_dim);
  } else {
    for (std::int64_t j = 0; j < here; ++j) convert(keys[first + j], head_dim, scratch + j * head_dim);
  }
  std::fill_n(scratch + here * head_dim, (count - here) * head_dim, Op{});
  return {scratch, head_dim};
}

// C [m, D] += A [m, k] B [k, D]: at most 64 columns per product, the bf16 kernels' limit. `ld` is D rounded up to 16.
template <typename Op, typename Real>
inline void gemm_columns(std::int64_t m, std::int64_t ld, std::int64_t k, const Op* a, std::int64_t lda, const Op* b,
                         Real* c) {
  constexpr std::int64_t words = std::is_same_v<Op, BFloat16> ? 2 : 1;
  for (std::int64_t n = 0; n < ld; n += 64) {
    tile_gemm(m, std::min<std::int64_t>(64, ld - n), k, a, lda, b + words * n, ld, c + n, ld, true);
  }
}

// Calls f<T, Op>() for a storage type and the operand type its products run in here.
template <typename F>
inline void with_stick_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float, float>();
    case DType::kFloat64: return f.template operator()<double, double>();
    case DType::kFloat16: return f.template operator()<Float16, float>();
    case DType::kBFloat16:
      return brgemm_available_bf16() ? f.template operator()<BFloat16, BFloat16>()
                                     : f.template operator()<BFloat16, float>();
  }
}

}  // namespace mfx::MFX_ISA
