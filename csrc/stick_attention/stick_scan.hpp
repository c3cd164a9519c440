// The stick scan over one tile of transposed scores S^T [keys, rows]: SIMD lanes are query rows, and the walk goes down
// from the newest key to the oldest with each row's stick in a register. Two transcendental results per score:
//
//   e = exp(s), u = 1 / (1 + e) = 1 - beta, beta = e u, weight = beta * (product of newer u in the tile) * stick.
//
// No logarithm, no shuffle; nothing of the scan is ever rounded below the accumulation type.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/simd.hpp"

namespace mfx::MFX_ISA {

// Into [-bound, bound]; NaN stays NaN.
inline VecF stick_clamp(VecF x, VecF bound) {
#if defined(MFX_ISA_AVX512)  // gcc compares and blends; the instructions give their second operand where one is NaN
  const __m512 high = reinterpret_cast<__m512>(bound), low = reinterpret_cast<__m512>(-bound);
  return reinterpret_cast<VecF>(_mm512_max_ps(low, _mm512_min_ps(high, reinterpret_cast<__m512>(x))));
#else
  x = bound < x ? bound : x;
  return -bound > x ? -bound : x;
#endif
}
inline VecD stick_clamp(VecD x, VecD bound) {
  x = bound < x ? bound : x;
  return -bound > x ? -bound : x;
}

// exp(scale * score) as a normal number whose 1 / (1 + e) is a normal number too (the scan runs with denormals
// flushed): scale * score is cut at +-80 (700 in double), where weights are 0 or 1 to every digit that is kept.
template <typename Real>
class ExpLogit;

template <>
class ExpLogit<float> {
 public:
  explicit ExpLogit(double scale)
      : factor_(broadcast(static_cast<float>(scale * 1.4426950408889634))),
        bound_(broadcast(static_cast<float>(std::min(80.0 / std::abs(scale), 1e38)))) {}

  // 2^(n + r) with n + r = score * factor, |r| <= 1/2, as exp_bounded().
  VecF operator()(VecF score) const {
    score = stick_clamp(score, bound_);
    constexpr float kShift = 12582912.0f + 127;
    const VecF shifted = score * factor_ + kShift;
    const VecF r = score * factor_ - (shifted - kShift);
    VecF p = r * 1.535335828e-4f + 1.339887853e-3f;
    p = p * r + 9.618437406e-3f;
    p = p * r + 5.550332458e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
    return p * reinterpret_cast<VecF>(reinterpret_cast<VecU32>(shifted) << 23);
  }

 private:
  VecF factor_, bound_;
};

template <>
class ExpLogit<double> {
 public:
  explicit ExpLogit(double scale)
      : factor_(broadcast(scale)), bound_(broadcast(std::min(700.0 / std::abs(scale), 1e300))) {}
  VecD operator()(VecD score) const { return exp_bounded(stick_clamp(score, bound_) * factor_); }

 private:
  VecD factor_, bound_;
};

// Two rows of weights or gradients rounded to bf16: interleaved, as a B operand in VNNI order takes them, and, if
// wanted, one by one.
inline void store_bf16_rows(VecF even, VecF odd, BFloat16* pairs, BFloat16* even_row = nullptr,
                            BFloat16* odd_row = nullptr) {
#if defined(MFX_ISA_AVX512_BF16)
  typedef std::uint16_t Rows __attribute__((vector_size(64)));
  const __m512bh rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even));
  Rows rows;
  std::memcpy(&rows, &rounded, sizeof rows);
  const Rows zipped = shuffle(rows, rows, [](int i) { return i / 2 + i % 2 * 16; });
  std::memcpy(pairs, &zipped, sizeof zipped);
  if (even_row != nullptr) {
    std::memcpy(even_row, &rounded, 32);
    std::memcpy(odd_row, reinterpret_cast<const char*>(&rounded) + 32, 32);
  }
#else
  const VecU32 both = interleave_bf16(even, odd);
  std::memcpy(pairs, &both, sizeof both);
  if (even_row != nullptr) {
    store(even_row, even);
    store(odd_row, odd);
  }
#endif
}

template <typename Real>
struct StickTile {
  const Real* scores;        // [keys, rows]
  std::int64_t rows;         // a multiple of 16
  std::int64_t keys;         // a multiple of 16
  const std::uint8_t* keep;  // [keys], null keeps all: a key that is not kept takes no stick
  const Real* newest;        // [rows], newest key of this tile a row sees; null where all rows see all keys
  double scale;              // of the scores
  Real* rem;                 // [rows], in: left at the tile's newer edge; out: left at its older edge
};

// What a tile leaves of a stick, as rem_after() on CUDA: where it took less than half, the stick less what was taken,
// for a product of many factors just below 1 would lose the sum of their small differences from it; else `product`, of
// the stick and all its keys' u.
template <typename V>
inline V stick_rem_after(V rem, V taken, V product) {
  return taken < rem * 0.5f ? rem - taken : product;
}

// Weights of kN vectors of rows from row `lane` on, as B operand of the value product: [keys, rows], for bf16 in VNNI
// pairs of keys.
template <typename Op, typename Real, int kN, bool kDiagonal, bool kKeep>
inline void stick_scan_forward_lanes(const StickTile<Real>& tile, std::int64_t lane, Op* weights) {
  using V = Vec<Real>;
  constexpr int w = kWidth<Real>;
  V rem[kN], product[kN], taken[kN], newest[kN];
  for (int n = 0; n < kN; ++n) {
    rem[n] = load(tile.rem + lane + n * w);
    product[n] = rem[n];
    taken[n] = V{};
    if constexpr (kDiagonal) newest[n] = load(tile.newest + lane + n * w);
  }
  const ExpLogit<Real> exp_logit(tile.scale);
  for (std::int64_t pair = tile.keys / 2; pair-- > 0;) {
    V weight[2][kN];
    for (int half = 1; half >= 0; --half) {
      const std::int64_t key = 2 * pair + half;
      if constexpr (kKeep) {
        if (!tile.keep[key]) {
          for (int n = 0; n < kN; ++n) weight[half][n] = V{};
          continue;
        }
      }
      for (int n = 0; n < kN; ++n) {
        V e = exp_logit(load(tile.scores + key * tile.rows + lane + n * w));
        if constexpr (kDiagonal) e = broadcast(static_cast<Real>(key)) <= newest[n] ? e : V{};
        const V u = reciprocal(1 + e);
        weight[half][n] = e * u * product[n];
        taken[n] += weight[half][n];
        product[n] *= u;
      }
    }
    for (int n = 0; n < kN; ++n) {
      if constexpr (std::is_same_v<Op, BFloat16>) {
        store_bf16_rows(weight[0][n], weight[1][n], weights + 2 * (pair * tile.rows + lane + n * w));
      } else {
        store(weights + (2 * pair) * tile.rows + lane + n * w, weight[0][n]);
        store(weights + (2 * pair + 1) * tile.rows + lane + n * w, weight[1][n]);
      }
    }
  }
  for (int n = 0; n < kN; ++n) store(tile.rem + lane + n * w, stick_rem_after(rem[n], taken[n], product[n]));
}

// Backward walks the same way with the same arithmetic, so it meets the same weights. With G = weight * dp,
//
//   ds = scale * (u G - beta * (sum of G over the older keys)).
//
// The walk goes against that sum. At the tile's older edge it is delta (the row's whole sum of G, known from o) less
// what has passed; from there a second sweep, oldest key first, adds up the tile's own G, for subtracting them one by
// one would leave rounding errors of the large newest ones in the small older ones. What rounding leaves at the edge is
// cut to what the stick allows: |sum of older G| <= stick * dp_bound, with dp_bound >= |do| max|v| + |d_remainder|;
// else it would be multiplied with the beta of every older key, however little stick is left. For the same reason G
// takes weights as they were rounded for the products (bf16): o, and so delta, is made of those.
template <typename Real>
struct StickGradTile {
  StickTile<Real> tile;
  Real* grad_scratch;    // [keys, rows], in: dP^T = V dO^T; overwritten
  Real* score_scratch;   // [keys, rows], tile.scores' memory; overwritten
  Real* g;               // [keys, rows], scratch
  const Real* delta;     // [rows]
  const Real* dp_bound;  // [rows]
  Real* sum_g;           // [rows], in and out: sum of G over all newer keys
};

// Writes weights and score gradients row-major [keys, rows] (A operands) and, for bf16, the gradients once more in
// VNNI pairs of keys (B operand).
template <typename Op, typename Real, int kN, bool kDiagonal, bool kKeep>
inline void stick_scan_backward_lanes(const StickGradTile<Real>& grad, std::int64_t lane, Op* weights, Op* grad_scores,
                                      Op* grad_scores_vnni) {
  using V = Vec<Real>;
  constexpr int w = kWidth<Real>;
  const StickTile<Real>& tile = grad.tile;
  const ExpLogit<Real> exp_logit(tile.scale);
  const V scale = broadcast(static_cast<Real>(tile.scale));
  V rem[kN], product[kN], taken[kN], newest[kN], sum_g[kN];
  for (int n = 0; n < kN; ++n) {
    rem[n] = load(tile.rem + lane + n * w);
    product[n] = rem[n];
    taken[n] = sum_g[n] = V{};
    if constexpr (kDiagonal) newest[n] = load(tile.newest + lane + n * w);
  }
  for (std::int64_t key = tile.keys; key-- > 0;) {
    const std::int64_t row = key * tile.rows + lane;
    const bool kept = !kKeep || tile.keep[key];
    for (int n = 0; n < kN; ++n) {
      const std::int64_t at = row + n * w;
      if (!kept) {
        store(weights + at, V{});
        continue;
      }
      V e = exp_logit(load(tile.scores + at));
      if constexpr (kDiagonal) e = broadcast(static_cast<Real>(key)) <= newest[n] ? e : V{};
      const V u = reciprocal(1 + e);
      const V beta = e * u;
      const V weight = beta * product[n];
      taken[n] += weight;
      product[n] *= u;
      store(weights + at, weight);
      V g = load(weights + at) * load(grad.grad_scratch + at);
      if constexpr (kDiagonal) g = broadcast(static_cast<Real>(key)) <= newest[n] ? g : V{};
      sum_g[n] += g;
      store(grad.g + at, g);
      store(grad.grad_scratch + at, u * g);
      store(grad.score_scratch + at, beta);
    }
  }
  V older[kN];
  for (int n = 0; n < kN; ++n) {
    const V rem_older = stick_rem_after(rem[n], taken[n], product[n]);
    sum_g[n] += load(grad.sum_g + lane + n * w);
    store(tile.rem + lane + n * w, rem_older);
    store(grad.sum_g + lane + n * w, sum_g[n]);
    const V most = rem_older * load(grad.dp_bound + lane + n * w);
    older[n] = stick_clamp(load(grad.delta + lane + n * w) - sum_g[n], most);
  }
  for (std::int64_t pair = 0; pair < tile.keys / 2; ++pair) {
    V ds[2][kN];
    for (int half = 0; half < 2; ++half) {
      const std::int64_t key = 2 * pair + half, row = key * tile.rows + lane;
      const bool kept = !kKeep || tile.keep[key];
      for (int n = 0; n < kN; ++n) {
        const std::int64_t at = row + n * w;
        if (!kept) {
          ds[half][n] = V{};
          continue;
        }
        ds[half][n] = scale * (load(grad.grad_scratch + at) - load(grad.score_scratch + at) * older[n]);
        if constexpr (kDiagonal) ds[half][n] = broadcast(static_cast<Real>(key)) <= newest[n] ? ds[half][n] : V{};
        older[n] += load(grad.g + at);
      }
    }
    for (int n = 0; n < kN; ++n) {
      const std::int64_t at = 2 * pair * tile.rows + lane + n * w;
      if constexpr (std::is_same_v<Op, BFloat16>) {
        store_bf16_rows(ds[0][n], ds[1][n], grad_scores_vnni + at + lane + n * w, grad_scores + at,
                        grad_scores + at + tile.rows);
      } else {
        store(grad_scores + at, ds[0][n]);
        store(grad_scores + at + tile.rows, ds[1][n]);
      }
    }
  }
}

// Calls lanes.template operator()<kN, kDiagonal, kKeep>(lane) over all rows, as many vectors at a time as registers
// hold the state of.
template <typename Real, typename Lanes>
inline void stick_scan(const StickTile<Real>& tile, Lanes&& lanes) {
  constexpr int w = kWidth<Real>;
  constexpr int most = 2;
  const auto run = [&]<bool kDiagonal, bool kKeep>() {
    std::int64_t lane = 0;
    for (; lane + most * w <= tile.rows; lane += most * w) lanes.template operator()<most, kDiagonal, kKeep>(lane);
    for (; lane < tile.rows; lane += w) lanes.template operator()<1, kDiagonal, kKeep>(lane);
  };
  if (tile.newest != nullptr) {
    tile.keep != nullptr ? run.template operator()<true, true>() : run.template operator()<true, false>();
  } else {
    tile.keep != nullptr ? run.template operator()<false, true>() : run.template operator()<false, false>();
  }
}

template <typename Op, typename Real>
inline void stick_scan_forward(const StickTile<Real>& tile, Op* weights) {
  stick_scan(tile, [&]<int kN, bool kDiagonal, bool kKeep>(std::int64_t lane) {
    stick_scan_forward_lanes<Op, Real, kN, kDiagonal, kKeep>(tile, lane, weights);
  });
}

template <typename Op, typename Real>
inline void stick_scan_backward(const StickGradTile<Real>& grad, Op* weights, Op* grad_scores, Op* grad_scores_vnni) {
  stick_scan(grad.tile, [&]<int kN, bool kDiagonal, bool kKeep>(std::int64_t lane) {
    stick_scan_backward_lanes<Op, Real, kN, kDiagonal, kKeep>(grad, lane, weights, grad_scores, grad_scores_vnni);
  });
}

}  // namespace mfx::MFX_ISA
