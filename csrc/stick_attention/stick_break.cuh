// The stick scan over one tile of scores in mma accumulators, in registers.
//
// Lane c of a quad owns a run of consecutive keys (interleaved_keys.cuh), scans it serially, and one scan over the quad
// finishes a row. Newest key first, with e = exp(scale s), u = 1 / (1 + e) = 1 - beta:
//
//   weight = e * (product of u from here to the newest key of the tile) * stick        since beta = e u
//
// No logarithm, and nothing is rounded below binary32. Forward takes one reciprocal per four keys, of the product of
// their 1 + e, and multiplies the 1 + e of the older ones among them back in. Backward needs every beta, 1 / (1 + 1 /
// e), and takes weight after weight from what is left of the stick.
#pragma once

#include "ptx/convert.cuh"
#include "ptx/fast_math.cuh"
#include "stick_attention/interleaved_keys.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::stick {

// exp(scale * s) = 2^min(s * factor, limit). At the limit, a logit of 21.5, u is 5e-10, so that weights are 0 or 1 to
// every digit that is kept, while the product of four 1 + e is in range.
struct ExpLogit {
  static constexpr float kLimit = 31.0f;
  float factor;  // scale * log2(e)

  __device__ float operator()(float score) const {
    return device::exp2_approx(device::min_nan(score * factor, kLimit));
  }
};

// beta itself, exactly 0 or 1 where the exponential leaves binary32.
struct Beta {
  float minus_factor;

  __device__ float operator()(float score) const {
    return device::reciprocal_approx(1.0f + device::exp2_approx(score * minus_factor));
  }
};

// Which keys of a lane's runs rows g and g + 8 see: bit i is key c * kRun + i. `newest` are the newest keys that they
// see, `kept` those that padding leaves, relative to the tile.
struct Visible {
  std::uint32_t of_row[2];
};

template <int kRun, typename Bits>
__device__ inline Visible visible_runs(int newest, int newest_of_other, Bits kept) {
  const int first = static_cast<int>(recomputed_lane() & 3) * kRun;
  const auto kept_of_run = static_cast<std::uint32_t>(kept >> first);
  const auto of_row = [&](int count) { return kept_of_run & ((1u << min(max(count, 0), kRun)) - 1); };
  return {of_row(newest + 1 - first), of_row(newest_of_other + 1 - first)};
}

// Weights lie in [0, 1]; in units of 2^-12 half precision keeps small ones (2^-24 is its smallest number).
template <typename Op>
inline constexpr float kWeightUnit = std::is_same_v<Op, Float16> ? 4096.0f : 1.0f;

// Sum of a lane's weights of row g + 8 half.
template <int kTiles>
__device__ inline float lane_sum(const float (&weights)[kTiles][4], int half) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 2 * kTiles - 1; i >= 0; --i) sum += weights[i / 2][2 * half + i % 2];
  return sum;
}

// What keys leave of a stick `rem`, `product` being that of their u: where they took less than half, the stick less
// what they took, for a product of many factors just below 1 would lose the sum of their small differences from it.
template <typename Rem>
__device__ inline Rem rem_after(Rem rem, Rem taken, float product) {
  return product > 0.5f ? rem - taken : rem * product;
}

// Moves the sticks of rows over a tile. Sums are formed where one of the rows needs them: `taken(row)` is what the keys
// of this lane took.
template <int kRows, typename Taken>
__device__ inline void move_rem(float (&rem)[kRows], const device::QuadScan (&newer)[kRows], Taken&& taken) {
  bool any = false;
#pragma unroll
  for (int row = 0; row < kRows; ++row) any = any || newer[row].all > 0.5f;
  if (!__any_sync(device::kAllLanes, any)) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) rem[row] *= newer[row].all;
    return;
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    rem[row] = rem_after(rem[row], device::lanes_sum<device::kQuad>(taken(row)), newer[row].all);
  }
}

// Scores of rows g and g + 8 become weights, times weight_unit; the sticks move to the tile's older edge.
template <bool kMasked, int kTiles>
__device__ inline void stick_break(float (&scores)[kTiles][4], const ExpLogit& exp_logit, const Visible& visible,
                                   float weight_unit, float (&rem)[2]) {
  constexpr int kShare = 4, kShares = 2 * kTiles / kShare;  // keys that share a reciprocal
  static_assert(2 * kTiles % kShare == 0, "whole shares");
  float rem_of[2][kShares];  // the product of u down to a share's oldest key
  device::QuadScan newer[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float product = 1.0f, inverse = 1.0f;
    device::static_for<2 * kTiles>([&](auto older) {
      constexpr int i = 2 * kTiles - 1 - older;
      float& e = scores[i / 2][2 * half + i % 2];
      e = exp_logit(e);
      if (kMasked) e = device::where_set<1u << i>(visible.of_row[half], e);
      inverse = i % kShare == kShare - 1 ? 1.0f + e : __fmaf_rn(inverse, e, inverse);
      if constexpr (i % kShare == 0) {
        product *= device::reciprocal_approx(inverse);
        rem_of[half][i / kShare] = product;
      }
    });
    newer[half] = device::quad_suffix_product(product);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float newer_rem = rem[half] * newer[half].later * weight_unit;
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      float next_rem = rem_of[half][share] * newer_rem;
#pragma unroll
      for (int i = kShare * share; i < kShare * (share + 1); ++i) {
        float& weight = scores[i / 2][2 * half + i % 2];
        const float e = weight;
        weight = e * next_rem;
        next_rem = __fmaf_rn(next_rem, e, next_rem);
      }
    }
  }
  move_rem(rem, newer, [&](int half) { return lane_sum(scores, half) * (1.0f / weight_unit); });
}

// Two neighbours rounded to operand type, as they lie in memory.
template <typename Op>
struct OperandPair {
  std::uint32_t words[sizeof(Op) / 2];
};

template <typename Op>
__device__ inline OperandPair<Op> operand_pair(float x, float y) {
  if constexpr (sizeof(Op) == 2) {
    return {device::pack_pair<Op>(x, y)};
  } else {
    return {__float_as_uint(x), __float_as_uint(y)};
  }
}

template <typename Op>
__device__ inline float2 rounded_pair(const OperandPair<Op>& pair) {
  if constexpr (sizeof(Op) == 2) {
    return {device::low_of_pair<Op>(pair.words[0]), device::high_of_pair<Op>(pair.words[0])};
  } else {
    return {__uint_as_float(pair.words[0]), __uint_as_float(pair.words[1])};
  }
}

// A lane's runs of keys of rows g and g + 8.
template <typename Op, int kTiles>
using LaneRuns = OperandPair<Op>[2][kTiles];

// Backward meets the same weights. With G = weight * dp and u = 1 - beta,
//
//   ds / scale = u G - beta * (sum of older G) = G - beta * (sum of G from here to the oldest key).
//
// The dQ kernel takes the sum of older G as what newer keys leave of the sum of all. There weights enter G as they
// were rounded for the product that made o, or the difference would keep what rounding took. It leaves a chunk state
// per row and lane's run of keys, with which the dK/dV kernel scans every run on its own.
struct alignas(8) ChunkState {
  float rem, older;  // at the run's newer edge; the sum of G over all keys older than the run
};

// Scores of a lane's run of row g + 8 half become weights, newest first, each a part beta of what is left of `rest`.
template <bool kMasked, int kTiles>
__device__ inline void break_run(float (&scores)[kTiles][4], float (&beta)[2 * kTiles], float& rest, int half,
                                 const Beta& beta_of, std::uint32_t visible) {
  device::static_for<2 * kTiles>([&](auto older) {
    constexpr int i = 2 * kTiles - 1 - older;
    float& score = scores[i / 2][2 * half + i % 2];
    beta[i] = beta_of(score);
    if (kMasked) beta[i] = device::where_set<1u << i>(visible, beta[i]);
    score = beta[i] * rest;
    rest -= score;
  });
}

// The scan of the dQ kernel. In: scores and dp. Out: ds / scale in the place of dp. On the way, for row g + 8 half:
// `next_rem(half, newer)` may look at the weights without the shares of newer lanes and tiles; `edge(half, sum_g)` gets
// the tile's sum of G and returns that of all keys older than the tile; `chunk_state(half, state)` gets the chunk state
// of this lane's run.
template <typename Op, bool kMasked, int kTiles, typename Left, typename Edge, typename State>
__device__ inline void stick_break_backward(float (&scores)[kTiles][4], float (&grads)[kTiles][4], const Beta& beta_of,
                                            const Visible& visible, const float (&rem)[2], Left&& next_rem, Edge&& edge,
                                            State&& chunk_state) {
  constexpr float kUnit = kWeightUnit<Op>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float beta[2 * kTiles], rest = 1.0f;
    break_run<kMasked>(scores, beta, rest, half, beta_of, visible.of_row[half]);
    const device::QuadScan newer = device::quad_suffix_product(rest);
    next_rem(half, newer);
    const float run_rem = rem[half] * newer.later, share = run_rem * kUnit;
    float sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 rounded =
          rounded_pair(operand_pair<Op>(scores[tile][2 * half] * share, scores[tile][2 * half + 1] * share));
      grads[tile][2 * half] *= kUnit == 1.0f ? rounded.x : rounded.x * (1.0f / kUnit);
      grads[tile][2 * half + 1] *= kUnit == 1.0f ? rounded.y : rounded.y * (1.0f / kUnit);
      sum += grads[tile][2 * half];
      sum += grads[tile][2 * half + 1];
    }
    const device::QuadPrefix older_lanes = device::quad_prefix_sum(sum);
    const float older = edge(half, older_lanes.all) + older_lanes.earlier;
    chunk_state(half, ChunkState{run_rem, older});
    float minus_sum = -older;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float& grad = grads[i / 2][2 * half + i % 2];
      minus_sum -= grad;
      grad = __fmaf_rn(beta[i], minus_sum, grad);
    }
  }
}

// The scan of the dK/dV kernel. In: scores and dp. Out: weights, times their unit, and ds / scale. Within a run weights
// enter G unrounded; at its edge the chunk state has the sums of the dQ kernel.
template <typename Op, bool kMasked, int kTiles>
__device__ inline void stick_break_runs(float (&scores)[kTiles][4], float (&grads)[kTiles][4],
                                        LaneRuns<Op, kTiles>& weights, LaneRuns<Op, kTiles>& grad_scores,
                                        const Beta& beta_of, const Visible& visible,
                                        const ChunkState (&chunk_states)[2]) {
  constexpr float kUnit = kWeightUnit<Op>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float beta[2 * kTiles], rest = chunk_states[half].rem * kUnit;
    break_run<kMasked>(scores, beta, rest, half, beta_of, visible.of_row[half]);
    float minus_sum = -chunk_states[half].older;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      weights[half][tile] = operand_pair<Op>(scores[tile][2 * half], scores[tile][2 * half + 1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = scores[tile][2 * half + i];
        float& grad = grads[tile][2 * half + i];
        grad *= kUnit == 1.0f ? weight : weight * (1.0f / kUnit);
        minus_sum -= grad;
        grad = __fmaf_rn(beta[2 * tile + i], minus_sum, grad);
      }
      grad_scores[half][tile] = operand_pair<Op>(grads[tile][2 * half], grads[tile][2 * half + 1]);
    }
  }
}

}  // namespace mfx::stick
