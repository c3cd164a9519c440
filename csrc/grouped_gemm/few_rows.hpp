// The expert product for decoding, when an expert has a handful of rows: multiply_few_rows, beside multiply_experts
// of products.hpp and with the same epilogue.
//
// The time is that of reading the matrices once, so they are read as they lie in memory, never packed. Where memory
// holds rows of W, a task takes consecutive whole rows of one matrix and adds x[r, i] W[i, :] to its own sums, eight
// matrix rows at a time, which touches the sums, in the first-level cache, once per eight; the next eight are
// prefetched in step. The last task of an expert adds the sums up, in order, and hands them to the epilogue. Where
// memory holds columns of W, a task takes a panel of them and every sum is one dot product.
#pragma once

#include <atomic>
#include <vector>

#include "core/dot_rows.hpp"
#include "core/parallel.hpp"
#include "core/prefetch.hpp"
#include "core/scratch.hpp"
#include "grouped_gemm/products.hpp"

namespace mfx::MFX_ISA {

inline constexpr std::int64_t kFewRowsTaskBytes = 1 << 19;  // of a matrix: long reads, yet tasks for many threads
inline constexpr std::int64_t kFewRowsStrip = 512;          // columns whose sums stay in L1 when there are many rows
inline constexpr int kFewRowsDepth = 8;
inline constexpr int kFewRowsGroup = 4;

// Up to so many rows of an expert, reading its matrix in place beats packing it by measurement.
inline constexpr std::int64_t kFewRows = 16;

inline bool has_few_rows(const RoutedLayout& layout) {
  for (std::int64_t expert = 0; expert < layout.num_experts; ++expert) {
    if (layout.offsets[expert + 1] - layout.offsets[expert] > kFewRows) return false;
  }
  return true;
}

template <typename T>
inline constexpr int kPairWidth = 2 * kWidth<Accumulate<T>>;

// y[r, c] += sum over kDepth of x[r, k] W[k, c] for kRows rows r and the columns c in [begin, end), the columns of
// whole pairs being in the order of load_pair.
template <int kRows, int kDepth, typename T>
inline void add_rows(const Accumulate<T>* x, std::int64_t x_stride, const T* matrix, std::int64_t stride,
                     std::int64_t begin, std::int64_t end, Accumulate<T>* y, std::int64_t y_stride) {
  using Acc = Accumulate<T>;
  constexpr int w = kWidth<Acc>;
  // Few rows: the factors stay in registers. More: they are read again for each pair, which the loads have room for.
  constexpr bool kFactorsInRegisters = kRows * kDepth <= kVectorRegisters / 2;
  Acc factor[kDepth][kRows];
  Vec<Acc> factors[kDepth][kRows];
  for (int k = 0; k < kDepth; ++k) {
    for (int r = 0; r < kRows; ++r) {
      factor[k][r] = x[r * x_stride + k];
      if constexpr (kFactorsInRegisters) factors[k][r] = broadcast(factor[k][r]);
    }
  }
  std::int64_t c = begin;
  for (; c + 2 * w <= end; c += 2 * w) {
    Vec<Acc> first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) {
      first[r] = load(y + r * y_stride + c);
      second[r] = load(y + r * y_stride + c + w);
    }
    for (int k = 0; k < kDepth; ++k) {
      prefetch_far(matrix + (k + kDepth) * stride + c);
      const auto pair = load_pair(matrix + k * stride + c);
      for (int r = 0; r < kRows; ++r) {
        const auto f = [&] {
          if constexpr (kFactorsInRegisters) return factors[k][r];
          if constexpr (!kFactorsInRegisters) return factor[k][r];
        }();
        first[r] += f * pair.first;
        second[r] += f * pair.second;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(y + r * y_stride + c, first[r]);
      store(y + r * y_stride + c + w, second[r]);
    }
  }
  for (; c < end; c += w) {
    for (int r = 0; r < kRows; ++r) {
      Vec<Acc> sum = load(y + r * y_stride + c);
      for (int k = 0; k < kDepth; ++k) sum += factor[k][r] * load_columns(matrix + k * stride, c, end);
      store(y + r * y_stride + c, sum);
    }
  }
}

template <int kDepth, typename T>
inline void add_row_groups(std::int64_t rows, const Accumulate<T>* x, std::int64_t x_stride, const T* matrix,
                           std::int64_t stride, std::int64_t begin, std::int64_t end, Accumulate<T>* y,
                           std::int64_t y_stride) {
  for (std::int64_t r = 0; r < rows; r += kFewRowsGroup, x += kFewRowsGroup * x_stride, y += kFewRowsGroup * y_stride) {
    switch (rows - r) {
      case 1: add_rows<1, kDepth>(x, x_stride, matrix, stride, begin, end, y, y_stride); break;
      case 2: add_rows<2, kDepth>(x, x_stride, matrix, stride, begin, end, y, y_stride); break;
      case 3: add_rows<3, kDepth>(x, x_stride, matrix, stride, begin, end, y, y_stride); break;
      default: add_rows<4, kDepth>(x, x_stride, matrix, stride, begin, end, y, y_stride); break;
    }
  }
}

// y = x[:, 0..depth) W[0..depth, :], columns in the order of load_pair.
template <typename T>
void multiply_rows(std::int64_t rows, const Accumulate<T>* x, std::int64_t x_stride, const T* matrix,
                   std::int64_t matrix_stride, std::int64_t depth, std::int64_t columns, Accumulate<T>* y,
                   std::int64_t y_stride) {
  std::fill_n(y, rows * y_stride, Accumulate<T>(0));
  const std::int64_t strip = rows <= 2 ? columns : kFewRowsStrip;
  for (std::int64_t begin = 0; begin < columns; begin += strip) {
    const std::int64_t end = std::min(columns, begin + strip);
    std::int64_t k = 0;
    for (; k + kFewRowsDepth <= depth; k += kFewRowsDepth) {
      add_row_groups<kFewRowsDepth>(rows, x + k, x_stride, matrix + k * matrix_stride, matrix_stride, begin, end, y,
                                    y_stride);
    }
    for (; k < depth; ++k) {
      add_row_groups<1>(rows, x + k, x_stride, matrix + k * matrix_stride, matrix_stride, begin, end, y, y_stride);
    }
  }
}

// sums[0] = sum over the chunks of sums[chunk], [rows, stride] each, columns back in their order.
template <typename T>
void add_chunks(Accumulate<T>* sums, std::int64_t chunks, std::int64_t rows, std::int64_t columns,
                std::int64_t stride) {
  using Acc = Accumulate<T>;
  constexpr int w = kWidth<Acc>;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += 2 * w) {
      Acc* y = sums + r * stride + c;
      VecPair<Vec<Acc>> sum = {load(y), load(y + w)};
      for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
        sum.first += load(y + chunk * rows * stride);
        sum.second += load(y + chunk * rows * stride + w);
      }
      if (c + 2 * w <= columns) sum = in_order<T>(sum);
      store(y, sum.first);
      store(y + w, sum.second);
    }
  }
}

template <int kParts, typename T, typename Epilogue>
void multiply_few_rows_by_rows(const RoutedLayout& layout, const Operand<Accumulate<T>>& a, std::int64_t in_features,
                               const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  const auto blocks = expert_blocks(layout, kPanel);
  const std::int64_t row_bytes = std::max<std::int64_t>(1, out_features) * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t depth = round_up(std::max<std::int64_t>(1, kFewRowsTaskBytes / row_bytes), kFewRowsDepth);
  const std::int64_t chunks = std::max<std::int64_t>(1, (in_features + depth - 1) / depth);
  const std::int64_t stride = round_up(out_features, kPairWidth<T>);
  const std::int64_t columns_per_part = out_features / kParts;
  const Scratch<Acc> sums(layout.num_slots() * chunks * stride);
  std::vector<std::atomic<std::int64_t>> unfinished(blocks.size());
  for (auto& count : unfinished) count.store(chunks, std::memory_order_relaxed);

  const auto readers = readers_of(static_cast<std::int64_t>(blocks.size()) * in_features * row_bytes);
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * chunks, readers, [&](std::int64_t task) {
    const auto index = static_cast<std::size_t>(task / chunks);
    const ExpertBlock& block = blocks[index];
    const std::int64_t chunk = task % chunks, first = chunk * depth;
    Acc* const block_sums = sums.data() + block.begin * chunks * stride;
    multiply_rows(block.rows, a.data + block.begin * a.stride + first, a.stride,
                  static_cast<const T*>(weight.data[block.expert]) + first * weight.stride, weight.stride,
                  std::min(depth, in_features - first), out_features, block_sums + chunk * block.rows * stride, stride);
    if (unfinished[index].fetch_sub(1, std::memory_order_acq_rel) > 1) return;

    add_chunks<T>(block_sums, chunks, block.rows, out_features, stride);
    Acc* const c = static_cast<Acc*>(thread_scratch(kParts * block.rows * kPanel * sizeof(Acc)));
    for (std::int64_t n = 0; n < columns_per_part; n += kPanel) {
      const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, columns_per_part - n));
      Acc* parts[2] = {};
      for (int part = 0; part < kParts; ++part) {
        parts[part] = c + part * block.rows * kPanel;
        for (std::int64_t r = 0; r < block.rows; ++r) {
          const Acc* row = block_sums + r * stride + part * columns_per_part + n;
          std::copy_n(row, columns, parts[part] + r * kPanel);
        }
      }
      epilogue({block.expert, block.begin, block.rows, n, columns}, parts);
    }
  });
}

// Rows of x that one pass over a column of W serves.
inline constexpr int kFewRowsDots = kVectorRegisters == 32 ? 4 : 2;

// c[r, j] = x_r . column_j for the block's rows and `columns` columns, which lie `stride` apart.
template <typename T>
void dot_columns(std::int64_t rows, const Accumulate<T>* x, std::int64_t x_stride, const T* matrix, std::int64_t stride,
                 std::int64_t depth, int columns, Accumulate<T>* c) {
  for (int j = 0; j < columns; j += kDotRows) {
    const T* column[kDotRows];  // beyond the end, the last one again
    for (int i = 0; i < kDotRows; ++i) column[i] = matrix + std::min(j + i, columns - 1) * stride;
    const int valid = std::min(kDotRows, columns - j);
    std::int64_t r = 0;
    const auto dot = [&]<int kRows>() {
      dot_block<kRows>(depth, column, stride, valid, x + r * x_stride, x_stride, c + r * kPanel + j, kPanel);
      r += kRows;
    };
    while (r + kFewRowsDots <= rows) dot.template operator()<kFewRowsDots>();
    while (r + 2 <= rows) dot.template operator()<2>();
    if (r < rows) dot.template operator()<1>();
  }
}

template <int kParts, typename T, typename Epilogue>
void multiply_few_rows_by_columns(const RoutedLayout& layout, const Operand<Accumulate<T>>& a, std::int64_t in_features,
                                  const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  const auto blocks = expert_blocks(layout, kPanel);
  const std::int64_t limit = out_features / kParts, panels = (limit + kPanel - 1) / kPanel;
  const std::int64_t matrix_bytes = in_features * out_features * static_cast<std::int64_t>(sizeof(T));
  const auto readers = readers_of(static_cast<std::int64_t>(blocks.size()) * matrix_bytes);
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * panels, readers, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / panels)];
    const std::int64_t n = task % panels * kPanel;
    const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, limit - n));
    Acc* const c = static_cast<Acc*>(thread_scratch(kParts * block.rows * kPanel * sizeof(Acc)));
    Acc* parts[2] = {};
    for (int part = 0; part < kParts; ++part) {
      parts[part] = c + part * block.rows * kPanel;
      dot_columns(block.rows, a.data + block.begin * a.stride, a.stride,
                  static_cast<const T*>(weight.data[block.expert]) + (part * limit + n) * weight.stride, weight.stride,
                  in_features, columns, parts[part]);
    }
    epilogue({block.expert, block.begin, block.rows, n, columns}, parts);
  });
}

template <int kParts, typename T, typename Epilogue>
void multiply_few_rows(const RoutedLayout& layout, const RoutedRows& rows, std::int64_t in_features,
                       const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  const auto a = gather_operand<T, Accumulate<T>>(layout, rows, in_features);
  if (weight.transposed) {
    multiply_few_rows_by_columns<kParts, T>(layout, a, in_features, weight, out_features, epilogue);
  } else {
    multiply_few_rows_by_rows<kParts, T>(layout, a, in_features, weight, out_features, epilogue);
  }
}

}  // namespace mfx::MFX_ISA
