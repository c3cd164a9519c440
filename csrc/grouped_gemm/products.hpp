// The expert products, each a grid of (expert, rows, columns) tasks whose shape depends on sizes alone, so that results
// do not depend on the number of threads:
//
//   multiply_experts    c[p, n] = a[p, :] B_e[:, n]          forward, with B = W; gradient of the rows, with B = W^T
//   accumulate_experts  dW_e    = sum over p of a[p]^T g[p]  gradient of the matrices
//
// The first hands each finished block of c to an epilogue while it is in the first-level cache, and is one of two, by
// how B lies in memory: multiply_packed packs rows of depth, multiply_in_place reads rows of columns where they are.
//
// T is the storage type, Op the operand type, sums are Accumulate<T>. brgemm compiles one micro-kernel per shape, so
// shapes are kept few: depths come in two or three sizes, heights up to 64.
#pragma once

#include <vector>

#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "core/tile_gemm.hpp"
#include "grouped_gemm/pack.hpp"

namespace mfx::MFX_ISA {

inline constexpr std::int64_t kBlockRows = 256;        // positions of one expert that share a pass over its matrix
inline constexpr std::int64_t kPanelBytes = 1 << 18;   // of one packed panel: a quarter of a second-level cache
inline constexpr std::int64_t kSlabBytes = 1 << 19;    // of what multiply_packed packs at once
inline constexpr std::int64_t kSumBytes = 1 << 20;     // of its sums: half of a second-level cache
inline constexpr std::int64_t kMaxDepth = 256;         // of one product in accumulate_experts
inline constexpr std::int64_t kStreamBytes = 1 << 25;  // of dW: more than caches hold until somebody reads it

// Consecutive positions of one expert. `padded` is the first position when every block is padded to kPad.
struct ExpertBlock {
  std::int64_t expert, begin, rows, padded;
};
inline constexpr std::int64_t kPad = 16;

inline std::vector<ExpertBlock> expert_blocks(const RoutedLayout& layout, std::int64_t max_rows) {
  std::vector<ExpertBlock> blocks;
  std::int64_t padded = 0;
  for (std::int64_t expert = 0; expert < layout.num_experts; ++expert) {
    const std::int64_t end = layout.offsets[expert + 1];
    for (std::int64_t begin = layout.offsets[expert]; begin < end; begin += max_rows) {
      const std::int64_t rows = std::min(max_rows, end - begin);
      blocks.push_back({expert, begin, rows, padded});
      padded += round_up(rows, kPad);
    }
  }
  return blocks;
}

// f(first, count) over [0, n) in pieces of at most kPanel. Equal ones, because small pieces multiply slowly; those of
// bf16 products in whole tiles of the matrix unit.
template <typename Op, typename F>
inline void for_row_pieces(std::int64_t n, F f) {
  std::int64_t pieces = (n + kPanel - 1) / kPanel;
  for (std::int64_t row = 0; row < n; --pieces) {
    const std::int64_t equal = (n - row + pieces - 1) / pieces;
    const std::int64_t rows = std::is_same_v<Op, BFloat16> ? std::min(round_up(equal, 32), n - row) : equal;
    f(row, rows);
    row += rows;
  }
}

// A row stride that does not put all rows into one set of the first-level cache.
template <typename Op>
inline std::int64_t operand_stride(std::int64_t columns) {
  const std::int64_t stride = round_up(columns, kInterleave<Op>);
  return stride * static_cast<std::int64_t>(sizeof(Op)) % 1024 == 0 ? stride + 64 / static_cast<int>(sizeof(Op))
                                                                    : stride;
}

// Rows in expert order in the operand type: the caller's own memory where it is that already.
template <typename Op>
struct Operand {
  const Op* data;
  std::int64_t stride;
  Scratch<Op> storage;
};

template <typename T, typename Op>
Operand<Op> gather_operand(const RoutedLayout& layout, const RoutedRows& rows, std::int64_t columns) {
  if constexpr (std::is_same_v<T, Op>) {
    if (rows.order == RowOrder::kExpert && columns % kInterleave<Op> == 0) {
      return {static_cast<const Op*>(rows.data), rows.stride, {}};
    }
  }
  const std::int64_t stride = operand_stride<Op>(columns);
  Scratch<Op> storage(layout.num_slots() * stride);
  const RowReader<T> row(rows, layout);
  parallel_for(layout.num_slots(), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      pack_row(row(p), columns, round_up(columns, kInterleave<Op>), storage.data() + p * stride);
    }
  });
  const Op* data = storage.data();
  return {data, stride, std::move(storage)};
}

inline constexpr std::int64_t kPrefetchRows = 8;  // of a matrix, ahead of the two that are being packed

template <typename T>
inline void prefetch_panel(const T* row) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < kPanel; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// Where a block of sums belongs.
struct BlockAt {
  std::int64_t expert, position, rows;  // the first position
  std::int64_t column;                  // the first one
  int columns;
};

// For every block of rows and columns: epilogue(at, parts) with parts[0] the sums, [rows, kPanel]. Where the activation
// is gated, parts[1] holds the columns half the matrix further on.
//
// A task takes a strip of the columns, as wide as its sums fit the second-level cache, and goes down the matrix slab by
// slab: packs whole rows of the strip, in the order of memory, which is twice as fast as packing panel by panel, then
// multiplies. The order of a sum depends on neither the strip's width nor the block's height.
template <int kParts, typename T, typename Op, typename Epilogue>
void multiply_packed(const RoutedLayout& layout, const Operand<Op>& a, std::int64_t in_features,
                     const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  const auto blocks = expert_blocks(layout, kBlockRows);
  if (blocks.empty()) return;
  std::int64_t most_rows = 0;
  for (const ExpertBlock& block : blocks) most_rows = std::max(most_rows, block.rows);
  const std::int64_t limit = out_features / kParts, depth = round_up(in_features, kInterleave<Op>);
  const std::int64_t slab =  // rows of the matrix; from sizes alone, since it cuts the sums
      std::clamp<std::int64_t>(kSlabBytes / (round_up(out_features, kPanel) * sizeof(Op)) / 32 * 32, 64, kMaxDepth);
  const std::int64_t all_panels = (limit + kPanel - 1) / kPanel;  // of a part
  const std::int64_t most_panels =
      std::max<std::int64_t>(1, kSumBytes / (kParts * most_rows * kPanel * static_cast<std::int64_t>(sizeof(Acc))));
  const std::int64_t least_strips =
      (4 * num_threads() + static_cast<std::int64_t>(blocks.size()) - 1) / static_cast<std::int64_t>(blocks.size());
  const std::int64_t strips =
      std::min(all_panels, std::max(least_strips, (all_panels + most_panels - 1) / most_panels));
  const std::int64_t panels = (all_panels + strips - 1) / strips;

  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * strips, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / strips)];
    const std::int64_t first = task % strips * panels * kPanel;
    const std::int64_t used = std::min(panels, (limit - first + kPanel - 1) / kPanel);
    if (used <= 0) return;
    const std::int64_t c_size = block.rows * kPanel, packed_size = std::min(slab, depth) * kPanel;
    Acc* const c = static_cast<Acc*>(
        thread_scratch(static_cast<std::size_t>(kParts * used) * (c_size * sizeof(Acc) + packed_size * sizeof(Op))));
    Op* const packed = reinterpret_cast<Op*>(c + kParts * used * c_size);
    const T* const matrix = static_cast<const T*>(weight.data[block.expert]) + first;
    const auto columns_of = [&](std::int64_t panel) {
      return static_cast<int>(std::min<std::int64_t>(kPanel, limit - first - panel * kPanel));
    };
    const BrgemmScope scope;

    for (std::int64_t k0 = 0; k0 < depth; k0 += slab) {
      const std::int64_t k = std::min(slab, depth - k0);
      for (std::int64_t l = 0; l < k; l += 2) {
        const T* const rows = matrix + (k0 + l) * weight.stride;
        const std::int64_t here = std::min<std::int64_t>(2, k - l);
        const std::int64_t read = std::min<std::int64_t>(2, in_features - k0 - l);
        for (std::int64_t part = 0; part < kParts; ++part) {
          for (std::int64_t panel = 0; panel < used; ++panel) {
            const T* const corner = rows + part * limit + panel * kPanel;
            const int columns = columns_of(panel);
            if (k0 + l + kPrefetchRows + 2 <= in_features) {
              prefetch_panel(corner + kPrefetchRows * weight.stride);
              prefetch_panel(corner + (kPrefetchRows + 1) * weight.stride);
            }
            pack_panel<T>([&](std::int64_t row) { return corner + row * weight.stride; }, read, here, columns,
                          static_cast<int>(round_up(columns, kPad)),
                          packed + (part * used + panel) * packed_size + l * kPanel);
          }
        }
      }
      for_row_pieces<Op>(block.rows, [&](std::int64_t row, std::int64_t rows) {
        const Op* const a_block = a.data + (block.begin + row) * a.stride + k0;
        for (std::int64_t panel = 0; panel < used; ++panel) {
          const int columns = columns_of(panel);
          Acc* parts[2] = {};
          for (std::int64_t part = 0; part < kParts; ++part) {
            parts[part] = c + (part * used + panel) * c_size + row * kPanel;
            tile_gemm(rows, round_up(columns, kPad), k, a_block, a.stride, packed + (part * used + panel) * packed_size,
                      kPanel, parts[part], kPanel, k0 > 0);
          }
          if (k0 + k == depth) {
            epilogue({block.expert, block.begin + row, rows, first + panel * kPanel, columns}, parts);
          }
        }
      });
    }
  });
}

// The same where memory holds the columns of the matrices as rows. The product is computed as B_e^T a^T, which takes
// the matrices as they lie in memory and packs the (smaller) rows instead.
template <int kParts, typename T, typename Op, typename Epilogue>
void multiply_in_place(const RoutedLayout& layout, const RoutedRows& rows_of_a, std::int64_t in_features,
                       const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  const auto blocks = expert_blocks(layout, kBlockRows);
  if (blocks.empty()) return;
  const std::int64_t limit = out_features / kParts, depth = round_up(in_features, kInterleave<Op>);
  const std::int64_t padded_slots = blocks.back().padded + round_up(blocks.back().rows, kPad);
  Scratch<Op> packed(padded_slots * depth);
  const RowReader<T> row(rows_of_a, layout);

  constexpr std::int64_t kPanels = kBlockRows / kPanel;
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * kPanels, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / kPanels)];
    const std::int64_t first = task % kPanels * kPanel;
    if (first >= block.rows) return;
    const std::int64_t rows = std::min<std::int64_t>(kPanel, block.rows - first);
    const std::int64_t width = round_up(rows, kPad);
    Op* out = packed.data() + (block.padded + first) * depth;
    const auto source = [&](std::int64_t s) { return row(block.begin + first + s); };
    if constexpr (kInterleave<Op> == 2) {
      pack_transposed_pairs(source, rows, width, in_features, out, width);
    } else {
      pack_transposed<T>(source, [](std::int64_t) { return Acc(1); }, rows, width, in_features, out, width);
    }
  });

  // A row is an operand as it is, unless it needs converting or an odd one padding.
  const bool in_place = std::is_same_v<T, Op> && in_features % kInterleave<Op> == 0;
  const std::int64_t step = std::min<std::int64_t>(depth, kPanelBytes / (kPanel * sizeof(Op)));
  const std::int64_t column_blocks = (limit + kPanel - 1) / kPanel;
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * column_blocks, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / column_blocks)];
    const std::int64_t column = task % column_blocks * kPanel;
    const std::int64_t columns = std::min<std::int64_t>(kPanel, limit - column);
    constexpr std::int64_t kPartSize = kPanels * kPanel * kPanel;
    Acc* const c = static_cast<Acc*>(thread_scratch(kParts * (kPartSize + kPanel * kPanel) * sizeof(Acc) +
                                                    static_cast<std::size_t>(step) * kPanel * sizeof(Op)));
    Acc* const turned = c + kParts * kPartSize;
    Op* const converted = reinterpret_cast<Op*>(turned + kParts * kPanel * kPanel);
    const BrgemmScope scope;

    for (std::int64_t k0 = 0; k0 < depth; k0 += step) {
      const std::int64_t k = std::min(step, depth - k0);
      for (std::int64_t part = 0; part < kParts; ++part) {
        const T* const matrix =
            static_cast<const T*>(weight.data[block.expert]) + (part * limit + column) * weight.stride + k0;
        const Op* b = reinterpret_cast<const Op*>(matrix);
        std::int64_t stride = weight.stride;
        if (!in_place) {
          if constexpr (sizeof(Op) >= sizeof(T)) {
            for (std::int64_t r = 0; r < columns; ++r) {
              pack_row(matrix + r * weight.stride, std::min(k, in_features - k0), k, converted + r * k);
            }
          }
          b = converted;
          stride = k;
        }
        for (std::int64_t first = 0; first < block.rows; first += kPanel) {
          const std::int64_t width = round_up(std::min<std::int64_t>(kPanel, block.rows - first), kPad);
          const Op* const a = packed.data() + (block.padded + first) * depth + k0 * width;
          for_row_pieces<Op>(columns, [&](std::int64_t r, std::int64_t rows) {
            tile_gemm(rows, width, k, b + r * stride, stride, a, width, c + part * kPartSize + (first + r) * kPanel,
                      kPanel, k0 > 0);
          });
        }
      }
    }
    for (std::int64_t first = 0; first < block.rows; first += kPanel) {
      const std::int64_t rows = std::min<std::int64_t>(kPanel, block.rows - first);
      Acc* parts[2] = {};
      for (std::int64_t part = 0; part < kParts; ++part) {
        parts[part] = turned + part * kPanel * kPanel;
        pack_transposed<Acc>([&](std::int64_t s) { return c + part * kPartSize + (first + s) * kPanel; },
                             [](std::int64_t) { return Acc(1); }, columns, round_up(columns, kPad), rows, parts[part],
                             kPanel);
      }
      epilogue({block.expert, block.begin + first, rows, column, static_cast<int>(columns)}, parts);
    }
  });
}

template <int kParts, typename T, typename Op, typename Epilogue>
void multiply_experts(const RoutedLayout& layout, const RoutedRows& rows, std::int64_t in_features,
                      const RoutedMatrices& weight, std::int64_t out_features, Epilogue epilogue) {
  if (weight.transposed) {
    multiply_in_place<kParts, T, Op>(layout, rows, in_features, weight, out_features, epilogue);
  } else {
    multiply_packed<kParts, T>(layout, gather_operand<T, Op>(layout, rows, in_features), in_features, weight,
                               out_features, epilogue);
  }
}

// grad_weight[e] = sum over the expert's positions of scale(p) * a[p]^T g[p], for experts whose pointer is not null.
template <typename T, typename Op, typename Scale>
void accumulate_experts(const RoutedLayout& layout, const RoutedRows& a, Scale scale, const RoutedRows& grad,
                        const RoutedMatrices& grad_weight, std::int64_t in_features, std::int64_t out_features) {
  if (grad_weight.transposed) {
    return accumulate_experts<T, Op>(layout, grad, scale, a, grad_weight.transpose(), out_features, in_features);
  }
  using Acc = Accumulate<T>;
  struct Expert {
    T* out;
    std::int64_t begin, rows, depth, stride;
    std::int64_t a_offset, b_offset;
  };
  const std::int64_t panels = (out_features + kPanel - 1) / kPanel;
  const std::int64_t row_blocks = (in_features + kPanel - 1) / kPanel;
  std::vector<Expert> experts;
  std::int64_t a_size = 0, b_size = 0;
  for (std::int64_t e = 0; e < layout.num_experts; ++e) {
    if (grad_weight.data[e] == nullptr) continue;
    const std::int64_t rows = layout.offsets[e + 1] - layout.offsets[e];
    const std::int64_t depth = round_up(rows, kPad);
    const std::int64_t stride = operand_stride<Op>(depth);
    experts.push_back({static_cast<T*>(grad_weight.data[e]), layout.offsets[e], rows, depth, stride, a_size, b_size});
    a_size += in_features * stride;
    b_size += panels * kPanel * depth;
  }
  Scratch<Op> packed_a(a_size), packed_b(b_size);
  const RowReader<T> a_row(a, layout), g_row(grad, layout);
  const auto size = static_cast<std::int64_t>(sizeof(T));
  const bool large = static_cast<std::int64_t>(experts.size()) * in_features * out_features * size >= kStreamBytes;

  parallel_tasks(static_cast<std::int64_t>(experts.size()) * (row_blocks + panels), [&](std::int64_t task) {
    const Expert& expert = experts[static_cast<std::size_t>(task / (row_blocks + panels))];
    const std::int64_t block = task % (row_blocks + panels);
    if (expert.rows == 0) return;
    if (block < row_blocks) {
      const std::int64_t i = block * kPanel;
      pack_transposed<T>([&](std::int64_t s) { return a_row(expert.begin + s) + i; },
                         [&](std::int64_t s) { return scale(expert.begin + s); }, expert.rows, expert.depth,
                         std::min<std::int64_t>(kPanel, in_features - i),
                         packed_a.data() + expert.a_offset + i * expert.stride, expert.stride);
    } else {
      const std::int64_t n = (block - row_blocks) * kPanel;
      const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, out_features - n));
      pack_panel<T>([&](std::int64_t s) { return g_row(expert.begin + s) + n; }, expert.rows, expert.depth, columns,
                    static_cast<int>(round_up(columns, kPad)), packed_b.data() + expert.b_offset + n * expert.depth);
    }
  });

  parallel_tasks(static_cast<std::int64_t>(experts.size()) * row_blocks, [&](std::int64_t task) {
    const Expert& expert = experts[static_cast<std::size_t>(task / row_blocks)];
    const std::int64_t i = task % row_blocks * kPanel;
    const std::int64_t height = std::min<std::int64_t>(kPanel, in_features - i);
    T* out = expert.out + i * out_features;
    if (expert.rows == 0) {
      std::memset(out, 0, static_cast<std::size_t>(height * out_features) * sizeof(T));
      return;
    }
    Acc* const c = static_cast<Acc*>(thread_scratch(kPanel * kPanel * sizeof(Acc)));
    const Op* a_block = packed_a.data() + expert.a_offset + i * expert.stride;
    const BrgemmScope scope;
    for (std::int64_t n = 0; n < out_features; n += kPanel) {
      const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, out_features - n));
      const int width = static_cast<int>(round_up(columns, kPad));
      const Op* b_panel = packed_b.data() + expert.b_offset + n * expert.depth;
      for (std::int64_t k0 = 0; k0 < expert.depth; k0 += kMaxDepth) {
        const std::int64_t k = std::min(kMaxDepth, expert.depth - k0);
        for_row_pieces<Op>(height, [&](std::int64_t row, std::int64_t rows) {
          tile_gemm(rows, width, k, a_block + row * expert.stride + k0, expert.stride, b_panel + k0 * kPanel, kPanel,
                    c + row * kPanel, kPanel, k0 > 0);
        });
      }
      const bool streamed = large && columns == kPanel && out_features * size % 64 == 0 &&
                            reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
      for (std::int64_t row = 0; row < height; ++row) {
        T* const to = out + row * out_features + n;
        const Acc* const from = c + row * kPanel;
        if (streamed) {
          for (int j = 0; j < kPanel; j += kWidth<Acc>) stream(to + j, load(from + j));
        } else {
          for (int j = 0; j < columns; j += kWidth<Acc>) store_columns(to, j, columns, load(from + j));
        }
      }
    }
    if (large) stream_fence();
  });
}

}  // namespace mfx::MFX_ISA
