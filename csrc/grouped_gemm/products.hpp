// The three expert products, each a grid of (expert, rows, columns) tasks whose shape depends on sizes alone, so that
// results do not depend on the number of threads:
//
//   multiply_experts             c[p, n] = a[p, :] W_e[:, n]         forward
//   multiply_experts_transposed  c[p, i] = g[p, :] W_e[i, :]^T       gradient of the rows
//   accumulate_experts           dW_e    = sum over p of a[p]^T g[p] gradient of the matrices
//
// The first two hand each finished block of c to an epilogue while it is in the first-level cache. T is the storage
// type, Op the operand type, sums are Accumulate<T>. brgemm compiles one micro-kernel
// per shape, so shapes are kept few: depths come in two or three sizes, heights up to 64.
#pragma once

#include <vector>

#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "core/tile_gemm.hpp"
#include "grouped_gemm/pack.hpp"

namespace mfx::MFX_ISA {

inline constexpr std::int64_t kBlockRows = 256;       // positions of one expert that share a pass over its matrix
inline constexpr std::int64_t kPanelBytes = 1 << 18;  // of one packed panel: a quarter of a second-level cache
inline constexpr std::int64_t kMaxDepth = 256;        // of one product in accumulate_experts

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

// f(first, count) over [0, n) in equal pieces of at most kPanel: equal, because small pieces multiply slowly.
template <typename F>
inline void for_row_pieces(std::int64_t n, F f) {
  std::int64_t pieces = (n + kPanel - 1) / kPanel;
  for (std::int64_t row = 0; row < n; --pieces) {
    const std::int64_t rows = (n - row + pieces - 1) / pieces;
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

// For every block of rows and columns: epilogue(p, rows, n, columns, parts) with the block's first position p and first
// column n, and parts[0] the sums, [rows, kPanel]. Where the activation is gated, parts[1] holds the columns half the
// matrix further on. A task packs two panels at once either way: longer runs of each row come from memory.
template <bool kGated, typename T, typename Op, typename Epilogue>
void multiply_experts(const RoutedLayout& layout, const Operand<Op>& a, std::int64_t in_features,
                      const void* const* weight, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  constexpr std::int64_t kPackRows = 16;
  const auto blocks = expert_blocks(layout, kBlockRows);
  const std::int64_t limit = kGated ? out_features / 2 : out_features;
  const std::int64_t distance = kGated ? limit : kPanel;  // from the first panel to the second
  const std::int64_t task_columns = kGated ? kPanel : 2 * kPanel;
  const std::int64_t tasks = (limit + task_columns - 1) / task_columns;
  const std::int64_t depth = round_up(in_features, kInterleave<Op>);
  const std::int64_t step = std::min<std::int64_t>(depth, kPanelBytes / (kPanel * sizeof(Op)));
  const bool whole = step >= depth;
  const std::int64_t c_rows = whole ? kPanel : kBlockRows;

  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * tasks, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / tasks)];
    const std::int64_t first = task % tasks * task_columns;
    Acc* const c = static_cast<Acc*>(thread_scratch(2 * (c_rows * kPanel * sizeof(Acc) + step * kPanel * sizeof(Op))));
    Op* const packed = reinterpret_cast<Op*>(c + 2 * c_rows * kPanel);
    const T* matrix = static_cast<const T*>(weight[block.expert]) + first;
    const auto columns_of = [&](int part) {
      const std::int64_t left = limit - first - (kGated ? 0 : part * kPanel);
      return static_cast<int>(std::clamp<std::int64_t>(left, 0, kPanel));
    };
    const int columns[2] = {columns_of(0), columns_of(1)};
    const BrgemmScope scope;

    for (std::int64_t k0 = 0; k0 < depth; k0 += step) {
      const std::int64_t k = std::min(step, depth - k0), k_read = std::min(step, in_features - k0);
      for (std::int64_t l = 0; l < k; l += kPackRows) {
        for (int part = 0; part < 2 && columns[part] > 0; ++part) {
          const T* corner = matrix + (k0 + l) * out_features + part * distance;
          pack_panel<T>([&](std::int64_t row) { return corner + row * out_features; }, std::min(kPackRows, k_read - l),
                        std::min(kPackRows, k - l), columns[part], static_cast<int>(round_up(columns[part], kPad)),
                        packed + (part * step + l) * kPanel);
        }
      }
      for_row_pieces(block.rows, [&](std::int64_t row, std::int64_t rows) {
        Acc* parts[2] = {};
        for (int part = 0; part < 2; ++part) {
          parts[part] = c + (part * c_rows + (whole ? 0 : row)) * kPanel;
          if (columns[part] == 0) continue;
          tile_gemm(rows, round_up(columns[part], kPad), k, a.data + (block.begin + row) * a.stride + k0, a.stride,
                    packed + part * step * kPanel, kPanel, parts[part], kPanel, k0 > 0);
        }
        if (k0 + k < depth) return;
        epilogue(block.begin + row, rows, first, columns[0], parts);
        if (!kGated && columns[1] > 0) {
          Acc* const second[2] = {parts[1], nullptr};
          epilogue(block.begin + row, rows, first + kPanel, columns[1], second);
        }
      });
    }
  });
}

// For every block: epilogue(p, rows, i, columns, c), c [rows, kPanel] as above, a single part. The product is computed
// as W_e g^T, which takes the matrices as they lie in memory and packs the (smaller) rows instead.
template <typename T, typename Op, typename Epilogue>
void multiply_experts_transposed(const RoutedLayout& layout, const RoutedRows& grad, const void* const* weight,
                                 std::int64_t in_features, std::int64_t out_features, Epilogue epilogue) {
  using Acc = Accumulate<T>;
  const auto blocks = expert_blocks(layout, kBlockRows);
  if (blocks.empty()) return;
  const std::int64_t depth = round_up(out_features, kInterleave<Op>);
  const std::int64_t padded_slots = blocks.back().padded + round_up(blocks.back().rows, kPad);
  Scratch<Op> packed(padded_slots * depth);
  const RowReader<T> row(grad, layout);

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
      pack_transposed_pairs(source, rows, width, out_features, out, width);
    } else {
      pack_transposed<T>(source, [](std::int64_t) { return Acc(1); }, rows, width, out_features, out, width);
    }
  });

  // The matrix is an operand as it is, unless it needs converting or its odd rows need padding.
  const bool in_place = std::is_same_v<T, Op> && out_features % kInterleave<Op> == 0;
  const std::int64_t step = std::min<std::int64_t>(depth, kPanelBytes / (kPanel * sizeof(Op)));
  const std::int64_t row_blocks = (in_features + kPanel - 1) / kPanel;
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * row_blocks, [&](std::int64_t task) {
    const ExpertBlock& block = blocks[static_cast<std::size_t>(task / row_blocks)];
    const std::int64_t i = task % row_blocks * kPanel;
    const std::int64_t columns = std::min<std::int64_t>(kPanel, in_features - i);
    Acc* const c = static_cast<Acc*>(thread_scratch((kPanels + 1) * kPanel * kPanel * sizeof(Acc) +
                                                    static_cast<std::size_t>(step) * kPanel * sizeof(Op)));
    Acc* const turned = c + kPanels * kPanel * kPanel;
    Op* const converted = reinterpret_cast<Op*>(turned + kPanel * kPanel);
    const T* matrix = static_cast<const T*>(weight[block.expert]) + i * out_features;
    const BrgemmScope scope;

    for (std::int64_t k0 = 0; k0 < depth; k0 += step) {
      const std::int64_t k = std::min(step, depth - k0);
      const Op* a = reinterpret_cast<const Op*>(matrix + k0);
      std::int64_t stride = out_features;
      if (!in_place) {
        if constexpr (sizeof(Op) >= sizeof(T)) {
          for (std::int64_t r = 0; r < columns; ++r) {
            pack_row(matrix + r * out_features + k0, std::min(k, out_features - k0), k, converted + r * k);
          }
        }
        a = converted;
        stride = k;
      }
      for (std::int64_t first = 0; first < block.rows; first += kPanel) {
        const std::int64_t width = round_up(std::min<std::int64_t>(kPanel, block.rows - first), kPad);
        const Op* b = packed.data() + (block.padded + first) * depth + k0 * width;
        for_row_pieces(columns, [&](std::int64_t r, std::int64_t rows) {
          tile_gemm(rows, width, k, a + r * stride, stride, b, width, c + (first + r) * kPanel, kPanel, k0 > 0);
        });
      }
    }
    for (std::int64_t first = 0; first < block.rows; first += kPanel) {
      const std::int64_t rows = std::min<std::int64_t>(kPanel, block.rows - first);
      pack_transposed<Acc>([&](std::int64_t s) { return c + (first + s) * kPanel; },
                           [](std::int64_t) { return Acc(1); }, columns, round_up(columns, kPad), rows, turned, kPanel);
      epilogue(block.begin + first, rows, i, static_cast<int>(columns), turned);
    }
  });
}

// grad_weight[e] = sum over the expert's positions of scale(p) * a[p]^T g[p], for experts whose pointer is not null.
template <typename T, typename Op, typename Scale>
void accumulate_experts(const RoutedLayout& layout, const RoutedRows& a, Scale scale, const RoutedRows& grad,
                        void* const* grad_weight, std::int64_t in_features, std::int64_t out_features) {
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
    if (grad_weight[e] == nullptr) continue;
    const std::int64_t rows = layout.offsets[e + 1] - layout.offsets[e];
    const std::int64_t depth = round_up(rows, kPad);
    const std::int64_t stride = operand_stride<Op>(depth);
    experts.push_back({static_cast<T*>(grad_weight[e]), layout.offsets[e], rows, depth, stride, a_size, b_size});
    a_size += in_features * stride;
    b_size += panels * kPanel * depth;
  }
  Scratch<Op> packed_a(a_size), packed_b(b_size);
  const RowReader<T> a_row(a, layout), g_row(grad, layout);

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
        for_row_pieces(height, [&](std::int64_t row, std::int64_t rows) {
          tile_gemm(rows, width, k, a_block + row * expert.stride + k0, expert.stride, b_panel + k0 * kPanel, kPanel,
                    c + row * kPanel, kPanel, k0 > 0);
        });
      }
      for (std::int64_t row = 0; row < height; ++row) {
        for (int j = 0; j < columns; j += kWidth<Acc>) {
          store_columns(out + row * out_features + n, j, columns, load(c + row * kPanel + j));
        }
      }
    }
  });
}

}  // namespace mfx::MFX_ISA
