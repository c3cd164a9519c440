// The stick scan over one tile of scores in mma accumulators, in registers.
//
// A row belongs to kLanes neighbouring lanes: the quad of an accumulator, or eight where the warps of a block share a
// row's scores. Each has a run of consecutive keys (interleaved_keys.cuh), scans it serially, and one scan over the
// lanes finishes the row. Scores of a lane's row r are elements 2r and 2r + 1 of each of kTiles tiles, oldest first: in
// an accumulator rows g and g + 8 of the warp's 16. Newest key first, with e = exp(scale s), u = 1 / (1 + e) = 1 -
// beta:
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
#include "stick_attention/stick_exhausted.hpp"
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

// Which keys of its run each row of a lane sees: bit i is the run's key i.
template <int kRows>
struct Visible {
  std::uint32_t of_row[kRows];
};

// `newest` are the newest keys that the rows see, `kept` those that padding leaves, relative to the tile that has a run
// of kRun keys for each of kLanes lanes.
template <int kRun, int kLanes, int kRows, typename Bits>
__device__ inline Visible<kRows> visible_runs(const int (&newest)[kRows], Bits kept) {
  const int first = static_cast<int>(recomputed_lane() & (kLanes - 1)) * kRun;
  const auto kept_of_run = static_cast<std::uint32_t>(kept >> first);
  Visible<kRows> visible;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    visible.of_row[row] = kept_of_run & ((1u << min(max(newest[row] + 1 - first, 0), kRun)) - 1);
  }
  return visible;
}

// Weights lie in [0, 1]; in units of 2^-12 half precision keeps small ones (2^-24 is its smallest number).
template <typename Op>
inline constexpr float kWeightUnit = std::is_same_v<Op, Float16> ? 4096.0f : 1.0f;

// Sum of a lane's weights of a row.
template <int kTiles, int kOfTile>
__device__ inline float lane_sum(const float (&weights)[kTiles][kOfTile], int row) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 2 * kTiles - 1; i >= 0; --i) sum += weights[i / 2][2 * row + i % 2];
  return sum;
}

// What keys leave of a stick `rem`, `product` being that of their u alone: where they took less than half, the stick
// less what they took, for a product of many factors just below 1 would lose the sum of their small differences from
// it.
template <typename Rem>
__device__ inline Rem rem_after(Rem rem, Rem taken, float product) {
  return product > 0.5f ? rem - taken : rem * product;
}

// Moves the sticks of rows over a tile. Sums are formed where one of the rows needs them: `taken(row)` is what the keys
// of this lane took.
template <int kLanes, int kRows, typename Taken>
__device__ inline void move_rem(float (&rem)[kRows], const device::LaneScan (&newer)[kRows], Taken&& taken) {
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
    rem[row] = rem_after(rem[row], device::lanes_sum<kLanes>(taken(row)), newer[row].all);
  }
}

// Barrier of the block: whether the sticks of all threads are exhausted(), which is false for NaN like at_most.
__device__ inline bool block_exhausted(const float (&rem)[2], float epsilon) {
  return device::barrier_all_at_most(rem[0], rem[1], epsilon);
}
__device__ inline bool block_exhausted(const float (&rem)[4], float epsilon) {
  return device::barrier_all_at_most(device::max_nan(rem[0], rem[1]), device::max_nan(rem[2], rem[3]), epsilon);
}

// Scores become weights, times weight_unit; the sticks move to the tile's older edge.
template <bool kMasked, int kLanes = device::kQuad, int kTiles, int kOfTile>
__device__ inline void stick_break(float (&scores)[kTiles][kOfTile], const ExpLogit& exp_logit,
                                   const Visible<kOfTile / 2>& visible, float weight_unit, float (&rem)[kOfTile / 2]) {
  constexpr int kRows = kOfTile / 2, kRun = 2 * kTiles;
  constexpr int kShare = kRun < 4 ? kRun : 4, kShares = kRun / kShare;  // keys that share a reciprocal
  static_assert(kRun % kShare == 0, "whole shares");
  float rem_of[kRows][kShares];  // the product of u down to a share's oldest key
  device::LaneScan newer[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float product = 1.0f, inverse = 1.0f;
    device::static_for<kRun>([&](auto older) {
      constexpr int i = kRun - 1 - older;
      float& e = scores[i / 2][2 * row + i % 2];
      e = exp_logit(e);
      if (kMasked) e = device::where_set<1u << i>(visible.of_row[row], e);
      inverse = i % kShare == kShare - 1 ? 1.0f + e : __fmaf_rn(inverse, e, inverse);
      if constexpr (i % kShare == 0) {
        product *= device::reciprocal_approx(inverse);
        rem_of[row][i / kShare] = product;
      }
    });
    newer[row] = device::lanes_later_product<kLanes>(product);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float newer_rem = rem[row] * newer[row].beyond * weight_unit;
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      float next_rem = rem_of[row][share] * newer_rem;
#pragma unroll
      for (int i = kShare * share; i < kShare * (share + 1); ++i) {
        float& weight = scores[i / 2][2 * row + i % 2];
        const float e = weight;
        weight = e * next_rem;
        next_rem = __fmaf_rn(next_rem, e, next_rem);
      }
    }
  }
  move_rem<kLanes>(rem, newer, [&](int row) { return lane_sum(scores, row) * (1.0f / weight_unit); });
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
// were rounded for the product that made o, or the difference would keep what rounding took. It leaves a run state
// per row and lane's run of keys, with which the dK/dV kernel scans every run on its own.
struct alignas(8) RunState {
  float rem, older;  // at the run's newer edge; the sum of G over all keys older than the run
};

// Scores of a row's run become weights, newest first, each a part beta of what is left of `rest`; before(key) is
// called ahead of each.
template <bool kMasked, int kTiles, int kOfTile, typename Before>
__device__ inline void break_run(float (&scores)[kTiles][kOfTile], float (&beta)[2 * kTiles], float& rest, int row,
                                 const Beta& beta_of, std::uint32_t visible, Before&& before) {
  device::static_for<2 * kTiles>([&](auto older) {
    constexpr int i = 2 * kTiles - 1 - older;
    before(std::integral_constant<int, i>{});
    float& score = scores[i / 2][2 * row + i % 2];
    beta[i] = beta_of(score);
    if (kMasked) beta[i] = device::where_set<1u << i>(visible, beta[i]);
    score = beta[i] * rest;
    rest -= score;
  });
}

// What a lane of the dQ kernel knows of its rows.
template <int kRows>
struct BackwardRows {
  float rem[kRows], sum_g[kRows];       // at the tile's newer edge; of newer tiles
  float delta[kRows], dp_bound[kRows];  // DeltaAndBound

  // The stick at the tile's older edge; scores are weights without the shares of newer lanes and tiles.
  template <int kLanes, int kTiles, int kOfTile>
  __device__ float next_rem(const float (&scores)[kTiles][kOfTile], int row, const device::LaneScan& newer) const {
    float next[1] = {rem[row]};
    move_rem<kLanes>(next, {newer}, [&](int) { return lane_sum(scores, row) * newer.beyond * rem[row]; });
    return next[0];
  }

  // The sum of G over all keys older than the tile, whose own is `of_tile`.
  __device__ float older(int row, float next_rem, float of_tile) {
    sum_g[row] += of_tile;
    const float most = next_rem * dp_bound[row];
    return device::max_nan(-most, device::min_nan(most, delta[row] - sum_g[row]));
  }
};

// The same of a lane of the dK/dV kernel that scans a row's tile with others, from the run state that the tile has.
struct BackwardRowOfState {
  float rem[1], sum_g_older;

  template <int kLanes, int kTiles, int kOfTile>
  __device__ float next_rem(const float (&)[kTiles][kOfTile], int, const device::LaneScan&) const {
    return rem[0];
  }
  __device__ float older(int, float, float) const { return sum_g_older; }
};

// The scan of the dQ kernel. In: scores and dp. Out: ds / scale in the place of dp, and weights, as rounded for the
// products and times their unit, in that of scores. The rows move to the tile's older edge; `leave(row, state)` gets
// the run state of this lane's run before they do, or an array of those of kParts equal parts of it, oldest first.
template <typename Op, bool kMasked, int kLanes = device::kQuad, int kParts = 1, int kTiles, int kOfTile, typename Rows,
          typename Leave>
__device__ inline void stick_break_backward(float (&scores)[kTiles][kOfTile], float (&grads)[kTiles][kOfTile],
                                            const Beta& beta_of, const Visible<kOfTile / 2>& visible, Rows& rows,
                                            Leave&& leave) {
  constexpr float kUnit = kWeightUnit<Op>;
  constexpr int kTilesOfPart = kTiles / kParts;
#pragma unroll
  for (int row = 0; row < kOfTile / 2; ++row) {
    float beta[2 * kTiles], rest = 1.0f;
    RunState states[kParts];
    break_run<kMasked>(scores, beta, rest, row, beta_of, visible.of_row[row], [&](auto key) {
      if constexpr ((key + 1) % (2 * kTilesOfPart) == 0) states[key / (2 * kTilesOfPart)].rem = rest;
    });
    const device::LaneScan newer = device::lanes_later_product<kLanes>(rest);
    const float next_rem = rows.template next_rem<kLanes>(scores, row, newer);
    const float run_rem = rows.rem[row] * newer.beyond, share = run_rem * kUnit;
    float sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile % kTilesOfPart == 0) states[tile / kTilesOfPart].older = sum;  // of this lane
      const float2 rounded =
          rounded_pair(operand_pair<Op>(scores[tile][2 * row] * share, scores[tile][2 * row + 1] * share));
      scores[tile][2 * row] = rounded.x;
      scores[tile][2 * row + 1] = rounded.y;
      grads[tile][2 * row] *= kUnit == 1.0f ? rounded.x : rounded.x * (1.0f / kUnit);
      grads[tile][2 * row + 1] *= kUnit == 1.0f ? rounded.y : rounded.y * (1.0f / kUnit);
      sum += grads[tile][2 * row];
      sum += grads[tile][2 * row + 1];
    }
    const device::LaneScan older_lanes = device::lanes_earlier_sum<kLanes>(sum);
    const float older = rows.older(row, next_rem, older_lanes.all) + older_lanes.beyond;
    if constexpr (kParts == 1) {
      leave(row, RunState{run_rem, older});
    } else {
#pragma unroll
      for (RunState& state : states) state = {run_rem * state.rem, older + state.older};
      leave(row, states);
    }
    rows.rem[row] = next_rem;
    float minus_sum = -older;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float& grad = grads[i / 2][2 * row + i % 2];
      minus_sum -= grad;
      grad = __fmaf_rn(beta[i], minus_sum, grad);
    }
  }
}

// The scan of the dK/dV kernel. In: scores and dp. Out: weights, times their unit, and ds / scale. Within a run weights
// enter G unrounded; at its edge the run state has the sums of the dQ kernel.
template <typename Op, bool kMasked, int kTiles>
__device__ inline void stick_break_runs(float (&scores)[kTiles][4], float (&grads)[kTiles][4],
                                        LaneRuns<Op, kTiles>& weights, LaneRuns<Op, kTiles>& grad_scores,
                                        const Beta& beta_of, const Visible<2>& visible,
                                        const RunState (&run_states)[2]) {
  constexpr float kUnit = kWeightUnit<Op>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float beta[2 * kTiles], rest = run_states[half].rem * kUnit;
    break_run<kMasked>(scores, beta, rest, half, beta_of, visible.of_row[half], [](auto) {});
    float minus_sum = -run_states[half].older;
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
