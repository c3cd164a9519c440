// Products of a few rows with a matrix of any storage type, which read it once.
#pragma once

#include <algorithm>

#include "core/divide.hpp"
#include "core/parallel.hpp"
#include "core/prefetch.hpp"
#include "core/simd.hpp"

namespace mfx::MFX_ISA {

// Rows of a matrix that lies in consecutive pieces.
struct Rows {
  std::int64_t num_rows, length;
  DType dtype;
  std::int64_t num_segments;
  const void* const* segments;
  const std::int64_t* segment_rows;

  template <typename T>
  const T* row(std::int64_t i) const {
    std::int64_t segment = 0;
    while (i >= segment_rows[segment]) i -= segment_rows[segment++];
    return static_cast<const T*>(segments[segment]) + i * length;
  }
};

inline constexpr int kDotRows = 4;
inline constexpr int kDotRowsAhead = 3 * kDotRows;  // prefetched; with fewer, two threads wait for memory

// c[t * ldc + r] = a_t . row_r for kTokens rows of A, lda apart, and kDotRows of the weight, row_stride apart, of which
// `valid` are wanted.
template <int kTokens, typename S, typename A>
inline void dot_block(std::int64_t length, const S* const* rows, std::int64_t row_stride, int valid, const A* a,
                      std::int64_t lda, A* c, std::int64_t ldc) {
  Vec<A> sums[kDotRows][kTokens] = {};
  for_lanes<A>(length, [&](std::int64_t l, int lanes) {
    Vec<A> token[kTokens];
    for (int t = 0; t < kTokens; ++t) token[t] = load_lanes_of(a + t * lda + l, lanes);
    for (int r = 0; r < kDotRows; ++r) {
      prefetch_far(rows[r] + kDotRowsAhead * row_stride + l);
      const Vec<A> weight = load_lanes_of(rows[r] + l, lanes);
      for (int t = 0; t < kTokens; ++t) sums[r][t] += weight * token[t];
    }
  });
  for (int r = 0; r < valid; ++r) {
    for (int t = 0; t < kTokens; ++t) c[t * ldc + r] = reduce_add(sums[r][t]);
  }
}

// C [m, rows] = A [m, length] rows^T for a few rows of A, where packing would cost more than the product itself (one
// token in generation reads the weights once). Parallel over the weight's rows.
template <typename A>
inline void multiply_few(std::int64_t m, const A* a, const Rows& rows, A* c, std::int64_t ldc) {
  const std::int64_t length = rows.length, blocks = ceil_div(rows.num_rows, kDotRows);
  const std::int64_t block_bytes = kDotRows * length * element_size(rows.dtype);
  const std::int64_t grain = ceil_div(kParallelBytes, std::max<std::int64_t>(1, block_bytes));
  parallel_for(blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    with_storage<A>(rows.dtype, [&](auto storage) {
      for (std::int64_t first = begin * kDotRows; first < std::min(end * kDotRows, rows.num_rows); first += kDotRows) {
        const decltype(storage)* row[kDotRows];  // beyond the end, the last one again
        for (int r = 0; r < kDotRows; ++r) {
          row[r] = rows.row<decltype(storage)>(std::min(first + r, rows.num_rows - 1));
        }
        const int valid = static_cast<int>(std::min<std::int64_t>(kDotRows, rows.num_rows - first));
        std::int64_t t = 0;
        const auto dot = [&]<int kTokens>() {
          dot_block<kTokens>(length, row, length, valid, a + t * length, length, c + t * ldc + first, ldc);
          t += kTokens;
        };
        while (t + 2 <= m) dot.template operator()<2>();
        if (t < m) dot.template operator()<1>();
      }
    });
  });
}

// c[t * ldc + l] += sum over r of a[t * lda + r] row_r[l], for kTokens rows of A and kRows of the matrix.
template <int kRows, int kTokens, typename S, typename A>
inline void add_rows(std::int64_t length, const S* const* rows, std::int64_t row_stride, const A* a, std::int64_t lda,
                     A* c, std::int64_t ldc) {
  Vec<A> factors[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) factors[r][t] = broadcast(a[t * lda + r]);
  }
  for_lanes<A>(length, [&](std::int64_t l, int lanes) {
    Vec<A> sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = load_lanes_of(c + t * ldc + l, lanes);
    for (int r = 0; r < kRows; ++r) {
      prefetch_far(rows[r] + kDotRowsAhead * row_stride + l);
      const Vec<A> row = load_lanes_of(rows[r] + l, lanes);
      for (int t = 0; t < kTokens; ++t) sums[t] += row * factors[r][t];
    }
    for (int t = 0; t < kTokens; ++t) store_lanes_of(c + t * ldc + l, sums[t], lanes);
  });
}

// C [m, length] = A [m, rows] rows for a few rows of A, lda apart: the rows one after the other, as they lie in memory.
// Parallel over columns.
template <typename A>
inline void multiply_few_back(std::int64_t m, const A* a, std::int64_t lda, const Rows& rows, A* c) {
  const std::int64_t length = rows.length;
  const std::int64_t column_bytes = rows.num_rows * element_size(rows.dtype);
  const std::int64_t grain = ceil_div(kParallelBytes, std::max<std::int64_t>(1, column_bytes));
  parallel_for(length, round_up(grain, kWidth<A>), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < m; ++t) std::fill(c + t * length + begin, c + t * length + end, A{0});
    with_storage<A>(rows.dtype, [&](auto storage) {
      using S = decltype(storage);
      const auto add = [&]<int kRows>(std::int64_t first) {
        const S* row[kRows];
        for (int r = 0; r < kRows; ++r) row[r] = rows.row<S>(first + r) + begin;
        std::int64_t t = 0;
        const auto add_tokens = [&]<int kTokens>() {
          add_rows<kRows, kTokens>(end - begin, row, length, a + t * lda + first, lda, c + t * length + begin, length);
          t += kTokens;
        };
        while (t + 2 <= m) add_tokens.template operator()<2>();
        if (t < m) add_tokens.template operator()<1>();
      };
      std::int64_t first = 0;
      for (; first + kDotRows <= rows.num_rows; first += kDotRows) add.template operator()<kDotRows>(first);
      for (; first < rows.num_rows; ++first) add.template operator()<1>(first);
    });
  });
}

}  // namespace mfx::MFX_ISA
