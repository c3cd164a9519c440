// The stick scan over one tile of scores in mma accumulators, in registers.
//
// A quad's lane c holds columns 2c and 2c + 1 of every 8-column tile j. Keys are stored in shared memory so that slot
// 8j + 2c + b is key c * (keys / 4) + 2j + b: lane c owns a contiguous run of keys, scans it serially, and one scan
// over the quad finishes a row. Newest key first, with e = exp(scale s), u = 1 / (1 + e) = 1 - beta:
//
//   weight = e * (product of u from here to the newest key of the tile) * stick        since beta = e u
//
// Two special-function results and no logarithm per score; nothing is rounded below binary32.
#pragma once

#include "device/fast_math.cuh"
#include "device/warp.cuh"

namespace mfx {

// Key in its tile that a slot of shared memory holds. Linear over disjoint bits: key(a | b) = key(a) + key(b).
template <int kKeys>
__host__ __device__ constexpr int stick_key_of_slot(int slot) {
  return (slot % 8 / 2) * (kKeys / 4) + slot / 8 * 2 + slot % 2;
}

// exp(scale * s) = 2^min(s * factor, limit). The limit, 80 in units of the logit, keeps u a normal number.
struct StickOdds {
  static constexpr float kLimit = 80.0f * 1.44269504f;
  float factor;  // scale * log2(e)

  __device__ float operator()(float score) const {
    return device::exp2_approx(device::min_nan(score * factor, kLimit));
  }
};

// Which keys of a lane's run a row sees: bit i is key c * (keys / 4) + i.
template <int kKeys>
__device__ inline std::uint32_t stick_visible(int newest, std::uint32_t keep) {
  constexpr int kRun = kKeys / 4;
  const int first = static_cast<int>(threadIdx.x & 3) * kRun;
  const int count = min(max(newest + 1 - first, 0), kRun);  // newest key the row sees, relative to the tile
  return keep & ((1u << count) - 1);
}

// What is left of a stick after a tile: where the tile took less than half, the stick less what was taken, for a
// product of many factors just below 1 would lose the sum of their small differences from it; else the product.
__device__ inline float stick_left(float stick, float product, float mass) {
  return mass < 0.5f ? stick - stick * mass : stick * product;
}

// Scores of rows g and g + 8 of a warp's 16 become weights, times weight_unit; the sticks move to the tile's older
// edge.
template <bool kMasked, int kTiles>
__device__ inline void stick_scan_forward(float (&scores)[kTiles][4], const StickOdds& odds,
                                          const std::uint32_t (&visible)[2], float weight_unit, float (&stick)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float product = 1.0f, taken = 0.0f;
#pragma unroll
    for (int i = 2 * kTiles - 1; i >= 0; --i) {
      float& score = scores[i / 2][2 * half + i % 2];
      float e = odds(score);
      if (kMasked) e = visible[half] >> i & 1 ? e : 0.0f;
      product *= device::reciprocal_approx(1.0f + e);
      score = e * product;
      taken += score;
    }
    const device::QuadScan newer = device::quad_suffix_product(product);
    const float mass = device::lanes_sum<device::kQuad>(taken * newer.later);
    const float share = stick[half] * newer.later * weight_unit;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) scores[i / 2][2 * half + i % 2] *= share;
    stick[half] = stick_left(stick[half], newer.all, mass);
  }
}

}  // namespace mfx
