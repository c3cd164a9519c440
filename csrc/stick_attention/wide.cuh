// What the kernels of stick_attention for head dims above 256, up to 1024, share: there the accumulators of a query
// tile do not fit into one warp, and the head dimension is split over the eight warps of a block, 128 columns each.
//
// A step works on 16 keys and 16 rows (32 in forward for 16-bit types). Each warp multiplies its own columns alone; the
// parts of S (and dP) meet in shared memory and are added up in a fixed order; each row is scanned once per block, by
// eight lanes with two neighbouring keys each; weights and score gradients go back through shared memory to all warps.
// Every byte of a tile is used by one warp, which copies it for itself: no barrier guards the tiles, two per step guard
// the exchange.
#pragma once

#include "ptx/regalloc.cuh"
#include "stick_attention/epilogue.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

template <typename Op>
struct WideShape {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumns = 128;  // per warp
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(Op));
  static constexpr int kSteps = kRowBytes / 32;
  static constexpr int kKeys = 16;
  static constexpr int kTileBytes = 16 * kRowBytes;         // a warp's columns of 16 rows or keys
  static constexpr int kPart = 16 * kKeys;                  // elements of a part of S for 16 rows
  static constexpr int kOperandBytes = kPart * sizeof(Op);  // weights or score gradients of 16 rows
};

// Where element (row, key) of an [rows, 16] part of S lies: halves of every other pair of rows are exchanged, so that
// neither the fragments that write nor the eight lanes per row that read meet a bank twice.
__device__ inline int wide_score(int row, int key) {
  return row * 16 + (key ^ (row >> 1 & 1) << 3);
}

// Byte offset of (row, inner) of an A operand [rows, 16] in the order in which gemm_ab() takes inner elements,
// chunks of 16 bytes exchanged so that ldmatrix meets no bank twice.
template <typename Op>
__device__ inline int wide_operand(int row, int inner) {
  if constexpr (sizeof(Op) == 2) return row * 32 + ((inner >> 3 ^ (row >> 2 & 1)) << 4) + (inner & 7) * 2;
  const int at = (inner & 8) + (inner & 1) * 4 + (inner >> 1 & 3);
  return row * 64 + ((at >> 2 ^ (row >> 1 & 3)) << 4) + (at & 3) * 4;
}

template <typename Op>
__device__ inline void wide_put(std::uint8_t* operand, int row, int inner, float x) {
  using T = typename Storage<Op>::Type;
  *reinterpret_cast<T*>(operand + wide_operand<Op>(row, inner)) = device::from_float<T>(x);
}

// acc [16, 128] += such an operand times a warp's tile.
template <typename Op>
__device__ inline void wide_accumulate(float (&acc)[WideShape<Op>::kColumnTiles][4], const void* operand,
                                       device::SharedAddress tile) {
  constexpr int kSteps = device::steps_of_tiles<Op>(2), kOperandRow = 16 * static_cast<int>(sizeof(Op));
  const int lane = threadIdx.x & 31, row = lane & 15, swizzle = sizeof(Op) == 2 ? row >> 2 & 1 : row >> 1 & 3;
  device::OperandA<kSteps> a;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = (2 * step + (lane >> 4)) ^ swizzle;
    device::ldmatrix_x4(a.step[step], device::shared_address(operand) + row * kOperandRow + (chunk << 4));
  }
  constexpr int kRowBytes = WideShape<Op>::kRowBytes;
  device::gemm_ab<Op, kRowBytes>(acc, a, device::b_columns<Op, kRowBytes>(tile));
}

// One warp's 128 columns of 16 rows into its tile; rows that are null and columns beyond the head are zeros.
template <typename T, int kRowBytes, typename RowAt>
__device__ inline void wide_copy(device::SharedAddress tile, int columns, bool aligned, const T* any, RowAt&& row_at) {
  constexpr int kChunks = kRowBytes / 16;
  const int lane = threadIdx.x & 31, chunk = lane % kChunks, column = chunk * (16 / static_cast<int>(sizeof(T)));
#pragma unroll 1
  for (int i = 0; i < 16 * kChunks / 32; ++i) {
    const int row = i * (32 / kChunks) + lane / kChunks;
    const T* const source = row_at(row);
    const bool present = source != nullptr && column < columns;
    const device::SharedAddress to = tile + device::swizzled_offset<kRowBytes>(row, chunk);
    if (aligned) {
      device::cp_async<16>(to, present ? source + column : any, present ? 16 : 0);
    } else {
      device::store_shared_128(to, present ? load_unaligned_chunk(source + column) : uint4{0, 0, 0, 0});
    }
  }
  device::cp_async_commit();
}

// A fragments of a warp's columns of 16 rows, by way of its tile.
template <typename T, int kRowBytes, typename RowAt>
__device__ inline void wide_fragments(device::FragmentA (&a)[kRowBytes / 32], device::SharedAddress tile, int columns,
                                      bool aligned, const T* any, RowAt&& row_at) {
  wide_copy<T, kRowBytes>(tile, columns, aligned, any, row_at);
  device::cp_async_wait_all();
  __syncwarp();
  device::static_for<kRowBytes / 32>(
      [&](auto step) { device::load_a<step>(a[step], device::a_rows<kRowBytes>(tile)); });
  __syncwarp();
}

// acc [16, 16] += A B^T over a warp's columns, the rows of B in its tile.
template <typename Op>
__device__ inline void wide_multiply(float (&acc)[2][4], device::FragmentA (&a)[WideShape<Op>::kSteps],
                                     device::SharedAddress tile) {
  constexpr int kRowBytes = WideShape<Op>::kRowBytes;
  device::static_for<WideShape<Op>::kSteps>([&](auto step) {
    if (device::kStepByStep<Op> && device::never(step)) return;
    std::uint32_t b[4];
    // All bits by XOR: with immediate offsets ptxas spills the dQ kernel's binary32 instance on sm_90.
    device::ldmatrix_x4(b, device::b_rows<kRowBytes>(tile) ^ (step * 32));
    if constexpr (sizeof(Op) == 4) {  // A's split into two tf32 parts would take registers for the whole walk
#pragma unroll
      for (int i = 0; i < 4; ++i) device::hide_from_optimizer(a[step][i]);
    }
    device::multiply_step<Op>(acc[0], a[step], b[0], b[1]);
    device::multiply_step<Op>(acc[1], a[step], b[2], b[3]);
  });
}

// The same with A in a tile, too.
template <typename Op>
__device__ inline void wide_multiply(float (&acc)[2][4], device::SharedAddress a_tile, device::SharedAddress b_tile) {
  constexpr int kRowBytes = WideShape<Op>::kRowBytes;
  device::static_for<WideShape<Op>::kSteps>([&](auto step) {
    if (device::kStepByStep<Op> && device::never(step)) return;
    device::FragmentA a;
    std::uint32_t b[4];
    device::load_a<step>(a, device::a_rows<kRowBytes>(a_tile));
    device::ldmatrix_x4<device::step_offset(step)>(b, device::b_rows<kRowBytes>(b_tile) ^ device::step_bits(step));
    device::multiply_step<Op>(acc[0], a, b[0], b[1]);
    device::multiply_step<Op>(acc[1], a, b[2], b[3]);
  });
}

// A warp's part of 16 rows, from fragments [rows, keys].
__device__ inline void wide_store_part(float* part, const float (&acc)[2][4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2 * 8 + lane / 4, key = i / 2 * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(&part[wide_score(row, key)]) =
        make_float2(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
  }
}

// This lane's two scores of a row, all warps' parts added up; parts are `pitch` elements apart.
__device__ inline float2 wide_sum(const float* parts, int pitch, int row) {
  float2 sum = make_float2(0, 0);
#pragma unroll 2
  for (int w = 0; w < 8; ++w) {
    const auto part = *reinterpret_cast<const float2*>(&parts[w * pitch + wide_score(row, 2 * (threadIdx.x & 7))]);
    sum = make_float2(sum.x + part.x, sum.y + part.y);
  }
  return sum;
}

// A row's scan by eight lanes. [0] is a lane's older key, [1] its newer one; weights are those for a whole stick.
struct WideScan {
  float e[2], u[2], weight[2];
  float all;  // the product of u over the tile

  __device__ WideScan(const float2& score, const ExpLogit& exp_logit, bool sees_older, bool sees_newer) {
    const int lane = threadIdx.x & 7;
    e[0] = sees_older ? exp_logit(score.x) : 0.0f;
    e[1] = sees_newer ? exp_logit(score.y) : 0.0f;
    u[0] = device::reciprocal_approx(1.0f + e[0]);
    u[1] = device::reciprocal_approx(1.0f + e[1]);
    float product = u[0] * u[1];  // of this lane's keys and, step by step, newer ones
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      const float newer = __shfl_down_sync(device::kAllLanes, product, step, 8);
      if (lane + step < 8) product *= newer;
    }
    all = __shfl_sync(device::kAllLanes, product, 0, 8);
    const float next = __shfl_down_sync(device::kAllLanes, product, 1, 8);
    const float later = lane == 7 ? 1.0f : next;
    weight[1] = e[1] * u[1] * later;
    weight[0] = e[0] * u[0] * u[1] * later;
  }

  // What the tile leaves of a stick.
  __device__ float next_rem(float rem) const {
    return rem_after(rem, rem * device::lanes_sum<8>(weight[0] + weight[1]), all);
  }
};

// Gradients of a lane's two scores, over the scale, from those of its weights; weights become those for `stick`,
// rounded for the product, times their unit. `edge(sum_g)` gets the tile's sum of G and returns that over all older
// keys. See stick_break_backward().
template <typename Op, typename Edge>
__device__ inline float2 wide_gradients(const WideScan& scan, float rem, const float2& grad_weights, float2& weights,
                                        Edge&& edge) {
  constexpr float kUnit = kWeightUnit<Op>;
  weights = rounded_pair(operand_pair<Op>(scan.weight[0] * (rem * kUnit), scan.weight[1] * (rem * kUnit)));
  const float g0 = weights.x * (1.0f / kUnit) * grad_weights.x, g1 = weights.y * (1.0f / kUnit) * grad_weights.y;
  const int lane = threadIdx.x & 7;
  float sum = g0 + g1;  // of this lane's keys and, step by step, older ones
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    const float more = __shfl_up_sync(device::kAllLanes, sum, step, 8);
    if (lane >= step) sum += more;
  }
  const float before = __shfl_up_sync(device::kAllLanes, sum, 1, 8);
  const float older = edge(__shfl_sync(device::kAllLanes, sum, 7, 8)) + (lane == 0 ? 0.0f : before);
  return {scan.u[0] * (g0 - scan.e[0] * older), scan.u[1] * (g1 - scan.e[1] * (older + g0))};
}

// Which of a lane's two keys a row sees.
struct WideVisible {
  bool older, newer;

  __device__ WideVisible(const StickAttentionProblem& p, const Sequence& s, int first_key, int newest_key) {
    const int key = first_key + 2 * static_cast<int>(threadIdx.x & 7);
    const bool* const mask = p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + s.batch * p.tokens_k;
    older = key <= newest_key && (mask == nullptr || mask[key]);
    newer = key + 1 <= newest_key && (mask == nullptr || mask[key + 1]);
  }
};

}  // namespace mfx::stick
