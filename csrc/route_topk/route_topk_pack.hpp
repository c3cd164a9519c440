// Weights and tiles as the operands of tile_gemm: storage types converted, panels of at most kPanel columns.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/divide.hpp"
#include "core/dot_rows.hpp"
#include "core/dtype_of.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "core/tile_gemm.hpp"
#include "moduleformer_ext/route_topk.hpp"

namespace mfx::MFX_ISA {

inline constexpr std::int64_t kPanel = 64;       // columns of B per product: what bf16 brgemm takes at most
inline constexpr std::int64_t kTileTokens = 64;  // rows of x per tile; fixed, for it decides the order of sums
inline constexpr std::int64_t kAlign = 16;       // panel widths are multiples, rows of tiles too

// V or, along its segments, W. Holds pointers into `network`.
inline Rows hidden_rows(const RouterGateParams& network) {
  return {network.hidden_dim, network.dim, network.hidden_weight_dtype, 1, &network.hidden_weight, &network.hidden_dim};
}
inline Rows expert_rows(const RouterGateParams& network) {
  const std::int64_t length = network.gate == RouterGate::kLinear ? network.dim : network.hidden_dim;
  return {network.num_experts, length, network.weight_dtype, network.num_segments, network.segments, network.num_rows};
}

// B [k, n] in panels of kPanel columns (the last one narrower, rounded up to kAlign and filled with zeros), each of
// them row-major, for bf16 in VNNI order with k rounded up to even.
template <typename Op>
class PackedB {
  static constexpr bool kVnni = std::is_same_v<Op, BFloat16>;

 public:
  PackedB(std::int64_t k, std::int64_t n)
      : k_(kVnni ? round_up(k, 2) : k), n_(n), data_(k_ * std::max(round_up(n, kAlign), kAlign)) {}

  std::int64_t k() const { return k_; }
  std::int64_t padded() const { return round_up(n_, kAlign); }
  std::int64_t width(std::int64_t column) const { return std::min(kPanel, padded() - column); }
  Op* panel(std::int64_t column) { return data_.data() + column * k_; }

  // C [m, padded()] = A [m, k()] B
  void multiply(std::int64_t m, const Op* a, std::int64_t lda, Accumulate<Op>* c, std::int64_t ldc) {
    for (std::int64_t column = 0; column < padded(); column += kPanel) {
      const std::int64_t n = width(column);
      tile_gemm(m, n, k_, a, lda, panel(column), n, c + column, ldc, false);
    }
  }

  // B = rows^T: blocks of one vector of rows, cut along k too so that there is work for every thread.
  void pack_transposed(const Rows& rows) {
    constexpr std::int64_t kBlock = 256;
    constexpr int w = kWidth<Accumulate<Op>>;
    const std::int64_t along_k = ceil_div(k_, kBlock);
    parallel_for(padded() / w * along_k, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t first = task % along_k * kBlock;
        transpose_block(rows, task / along_k * w, first, std::min(k_, first + kBlock));
      }
    });
  }

  // B = rows, k being the number of rows.
  void pack(const Rows& rows) {
    constexpr std::int64_t kStep = kVnni ? 2 : 1;
    parallel_for(k_ / kStep, 16, [&](std::int64_t begin, std::int64_t end) {
      with_storage<Accumulate<Op>>(rows.dtype, [&](auto storage) {
        using S = decltype(storage);
        for (std::int64_t i = begin * kStep; i < end * kStep; i += kStep) {
          const S* next = kVnni && i + 1 < rows.num_rows ? rows.row<S>(i + 1) : nullptr;
          pack_rows(i, rows.row<S>(i), next);
        }
      });
    });
  }

  // Row i (for bf16 rows i and i + 1) of B, [n] each; null stands for zeros.
  template <typename S>
  void pack_rows(std::int64_t i, const S* row, const S* next = nullptr) {
    constexpr int w = kWidth<Accumulate<Op>>;
    for (std::int64_t column = 0; column < padded(); column += w) {
      const std::int64_t start = column / kPanel * kPanel, n = width(start);
      const int valid = static_cast<int>(std::clamp<std::int64_t>(n_ - column, 0, w));
      Op* to = panel(start) + i * n;
      if constexpr (kVnni && std::is_same_v<S, BFloat16>) {
        if (row != nullptr && next != nullptr && valid == w) {  // the bits as they are
          const VecU32 pairs = interleave_halves(row + column, next + column);
          std::memcpy(to + 2 * (column - start), &pairs, sizeof pairs);
          continue;
        }
      }
      const auto values = row == nullptr ? Vec<Accumulate<Op>>{} : load_lanes_of(row + column, valid);
      if constexpr (kVnni) {
        const VecF odd = next == nullptr ? VecF{} : load_lanes_of(next + column, valid);
        const VecU32 pairs = interleave_bf16(values, odd);
        std::memcpy(to + 2 * (column - start), &pairs, sizeof pairs);
      } else {
        store(to + (column - start), values);
      }
    }
  }

 private:
  // Columns [column, column + one vector) of B, rows [first, last).
  void transpose_block(const Rows& rows, std::int64_t column, std::int64_t first, std::int64_t last) {
    using Unit = std::conditional_t<kVnni, std::uint32_t, Accumulate<Op>>;  // bf16: pairs along k stay together
    constexpr int w = kWidth<Unit>;
    constexpr std::int64_t kPerUnit = sizeof(Unit) / sizeof(Op);
    const std::int64_t start = column / kPanel * kPanel, n = width(start);
    const std::int64_t valid_rows = std::clamp<std::int64_t>(rows.num_rows - column, 0, w);
    Op* to = panel(start) + (column - start) * kPerUnit;
    with_storage<Accumulate<Op>>(rows.dtype, [&](auto storage) {
      using S = decltype(storage);
      const S* row[w];
      for (std::int64_t i = 0; i < valid_rows; ++i) row[i] = rows.row<S>(column + i);
      for (std::int64_t l = first; l < last; l += w * kPerUnit) {
        const std::int64_t valid = std::min<std::int64_t>(w * kPerUnit, rows.length - l);
        Vec<Unit> block[w] = {};
        for (std::int64_t i = 0; i < valid_rows; ++i) {
          if constexpr (!kVnni) {
            block[i] = load_lanes_of(row[i] + l, static_cast<int>(valid));
          } else if constexpr (std::is_same_v<S, BFloat16>) {  // the only storage that is multiplied as bf16
            if (valid == w * kPerUnit) {
              block[i] = load_raw<VecU32>(row[i] + l);
            } else {
              std::memcpy(&block[i], row[i] + l, static_cast<std::size_t>(valid) * sizeof(S));
            }
          }
        }
        transpose<Unit>(block);
        const std::int64_t units = std::min<std::int64_t>(w, (last - l) / kPerUnit);
        for (std::int64_t j = 0; j < units; ++j) std::memcpy(to + (l + j * kPerUnit) * n, &block[j], kVectorBytes);
      }
    });
  }

  std::int64_t k_, n_;
  Scratch<Op> data_;
};

// Rows [first, first + count) of x as Op: in place where x is stored so, else converted into `scratch`.
template <typename Op>
inline const Op* operand_rows(const RouterGateParams& n, std::int64_t first, std::int64_t count, Op* scratch) {
  if (n.x_dtype == kDTypeOf<Op>) return static_cast<const Op*>(n.x) + first * n.dim;
  with_storage<Accumulate<Op>>(n.x_dtype, [&](auto storage) {
    convert(static_cast<const decltype(storage)*>(n.x) + first * n.dim, count * n.dim, scratch);
  });
  return scratch;
}

// Whether packing the weights would cost more than multiplying them.
inline bool are_few(const RouterGateParams& network) {
  constexpr std::int64_t kFewTokens = 8;
  return network.num_tokens >= 1 && network.num_tokens <= kFewTokens;
}

// What multiplies x: bf16 where x and the weight it meets are both bf16 and the processor multiplies it (which needs
// pairs along D), else the result type.
template <typename F>
inline void with_operand(const RouterGateParams& network, F f) {
  const DType weight = network.gate == RouterGate::kLinear ? network.weight_dtype : network.hidden_weight_dtype;
  const bool halves = network.gate != RouterGate::kLogits && network.x_dtype == DType::kBFloat16 &&
                      weight == DType::kBFloat16 && network.dim % 2 == 0;
  if (network.x_dtype == DType::kFloat64) {
    f(double{});
  } else if (halves && brgemm_available_bf16()) {
    f(BFloat16{});
  } else {
    f(float{});
  }
}

}  // namespace mfx::MFX_ISA
