// Products of one warp with operands in swizzled shared-memory tiles (swizzle.cuh) of the types of operand.cuh.
//
// ldmatrix moves 16-byte rows and does not mind the element size, so that untransposed operands look the same in all
// types. A tile's rows are kRowBytes, a power of two >= 128, apart; tiles are aligned to kRowBytes, so that XOR selects
// a chunk of 128 bytes and the rest of the way is an immediate offset.
#pragma once

#include "ptx/ldmatrix.cuh"
#include "ptx/regalloc.cuh"
#include "ptx/vector_memory.cuh"
#include "tile/operand.cuh"
#include "tile/static_for.cuh"
#include "tile/swizzle.cuh"

namespace mfx::device {

// Lane's address in a tile for load_a(): 16 rows, one step.
template <int kRowBytes>
__device__ inline SharedAddress a_rows(SharedAddress tile) {
  const std::uint32_t lane = threadIdx.x & 31;
  return tile + swizzled_offset<kRowBytes>(lane & 15, lane >> 4);
}

// Where a step's 32 bytes are in a row: bits of the address that the swizzle knows, and bytes after it.
constexpr int step_bits(int step) {
  return step * 32 % 128;
}
constexpr int step_offset(int step) {
  return step * 32 - step_bits(step);
}

// The A fragment of step kStep of the 16 rows that `rows` stands for.
template <int kStep>
__device__ inline void load_a(FragmentA& a, SharedAddress rows) {
  ldmatrix_x4<step_offset(kStep)>(a, rows ^ step_bits(kStep));
}

// The A fragments of the 16 rows that `rows` stands for, step by step: loaded once, or anew for every use. With kHide
// what follows from fragments that were loaded once, as the two parts of 3xTF32, is computed anew for every use.
template <int kRowBytes, bool kKeep, bool kHide = false>
class RowsA {
 public:
  RowsA() = default;
  __device__ explicit RowsA(SharedAddress rows) : rows_(rows) {
    if constexpr (kKeep) {
      static_for<kRowBytes / 32>([&](auto step) { load_a<step>(kept_[step], rows_); });
    }
  }

  template <typename Step>
  __device__ void operator()(Step step, FragmentA& a) const {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = kept_[step][i];
        if constexpr (kHide) hide_from_optimizer(a[i]);
      }
    } else {
      load_a<step>(a, rows_);
    }
  }

 private:
  SharedAddress rows_;
  FragmentA kept_[kKeep ? kRowBytes / 32 : 1];
};

// Lane's address in a tile for gemm_abt().
template <int kRowBytes>
__device__ inline SharedAddress b_rows(SharedAddress tile) {
  const std::uint32_t lane = threadIdx.x & 31;
  return tile + swizzled_offset<kRowBytes>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// Which row of a tile a column of a product, or an element of its inner dimension, belongs to: here n to row n. Of the
// next sixteen the lanes' addresses are kRowsOf16 rows further on; `bits` are those that the swizzle knows.
struct RowOrder {
  static constexpr int kRowsOf16 = 16;
  static constexpr int bits(int step, int /*sixteen*/) { return step_bits(step); }
};

// What 16 of an accumulator's rows have of a tile, group after group.
template <int kGroup, int kOfTile>
__device__ inline float (&group_of(float (&tile)[kOfTile]))[4] {
  static_assert(4 * kGroup + 4 <= kOfTile);
  return reinterpret_cast<float (&)[4]>(tile[4 * kGroup]);
}

// acc [16, 8 kTiles] += A [16, kRowBytes] B^T, where columns of acc belong to rows of the tile. `a_at(step, a)` loads
// the fragments of A.
template <typename Op, int kRowBytes, typename Order = RowOrder, int kTiles, typename LoadA>
__device__ inline void gemm_abt(float (&acc)[kTiles][4], LoadA&& a_at, SharedAddress rows) {
  static_assert(kTiles % 2 == 0, "two tiles of 8 columns per ldmatrix");
  static_for<kRowBytes / 32>([&](auto step) {
    FragmentA a;
    a_at(step, a);
    static_for<kTiles / 2>([&](auto pair) {
      if (kStepByStep<Op> && never(step * (kTiles / 2) + pair)) return;
      std::uint32_t b[4];
      ldmatrix_x4<step_offset(step) + pair * Order::kRowsOf16 * kRowBytes>(b, rows ^ Order::bits(step, pair));
      multiply_step<Op>(acc[2 * pair], a, b[0], b[1]);
      multiply_step<Op>(acc[2 * pair + 1], a, b[2], b[3]);
    });
  });
}

// The same of several times 16 rows, for which the tile is read once: of group g elements 4g to 4g + 3 of an
// accumulator's tile, and a_at[g].
template <typename Op, int kRowBytes, typename Order = RowOrder, int kTiles, int kOfTile, typename LoadA>
__device__ inline void gemm_abt_groups(float (&acc)[kTiles][kOfTile], const LoadA (&a_at)[kOfTile / 4],
                                       SharedAddress rows) {
  static_assert(kTiles % 2 == 0 && !kStepByStep<Op>);
  static_for<kRowBytes / 32>([&](auto step) {
    FragmentA a[kOfTile / 4];
    static_for<kOfTile / 4>([&](auto group) { a_at[group](step, a[group]); });
    static_for<kTiles / 2>([&](auto pair) {
      std::uint32_t b[4];
      ldmatrix_x4<step_offset(step) + pair * Order::kRowsOf16 * kRowBytes>(b, rows ^ Order::bits(step, pair));
      static_for<kOfTile / 4>([&](auto group) {
        multiply_step<Op>(group_of<group>(acc[2 * pair]), a[group], b[0], b[1]);
        multiply_step<Op>(group_of<group>(acc[2 * pair + 1]), a[group], b[2], b[3]);
      });
    });
  });
}

// Steps that 8 kTiles columns of an accumulator make as the inner dimension of a following product.
template <typename Op>
inline constexpr int steps_of_tiles(int tiles) {
  return kIs16Bit<Op> ? tiles / 2 : tiles;
}

// The A fragments of an inner dimension of kSteps steps.
template <int kSteps>
struct OperandA {
  FragmentA step[kSteps];
};

// Rounds an accumulator [16, 8 kTiles] to A fragments. The inner elements of a 32-bit step are taken in the order (0,
// 2, 4, 6, 1, 3, 5, 7), which is how lanes hold them; gemm_ab() does the same.
template <typename Op, int kGroup = 0, int kTiles, int kOfTile>
__device__ inline OperandA<steps_of_tiles<Op>(kTiles)> to_operand(const float (&acc)[kTiles][kOfTile]) {
  constexpr int g = 4 * kGroup;
  OperandA<steps_of_tiles<Op>(kTiles)> a;
#pragma unroll
  for (int step = 0; step < steps_of_tiles<Op>(kTiles); ++step) {
    if constexpr (kIs16Bit<Op>) {
      a.step[step][0] = pack_pair<Op>(acc[2 * step][g], acc[2 * step][g + 1]);
      a.step[step][1] = pack_pair<Op>(acc[2 * step][g + 2], acc[2 * step][g + 3]);
      a.step[step][2] = pack_pair<Op>(acc[2 * step + 1][g], acc[2 * step + 1][g + 1]);
      a.step[step][3] = pack_pair<Op>(acc[2 * step + 1][g + 2], acc[2 * step + 1][g + 3]);
    } else {
      a.step[step][0] = __float_as_uint(acc[step][g]);
      a.step[step][1] = __float_as_uint(acc[step][g + 2]);
      a.step[step][2] = __float_as_uint(acc[step][g + 1]);
      a.step[step][3] = __float_as_uint(acc[step][g + 3]);
    }
  }
  return a;
}

// Lane's address in a tile for gemm_ab().
template <typename Op, int kRowBytes>
__device__ inline SharedAddress b_columns(SharedAddress tile) {
  const std::uint32_t lane = threadIdx.x & 31;
  if constexpr (kIs16Bit<Op>) return tile + swizzled_offset<kRowBytes>(lane & 15, lane >> 4);
  const std::uint32_t row = 2 * (lane & 3), column = lane >> 2;
  return tile + swizzled_offset<kRowBytes>(row, column >> 2) + (column & 3) * 4;
}

// acc [16, 8 kTiles] += A B, where inner elements belong to rows of the tile and column n of acc to its column n.
template <typename Op, int kRowBytes, typename Order = RowOrder, int kTiles, int kSteps>
__device__ inline void gemm_ab(float (&acc)[kTiles][4], const OperandA<kSteps>& a, SharedAddress columns) {
  if constexpr (kIs16Bit<Op>) {
    static_for<kTiles / 2>([&](auto pair) {
      static_for<kSteps>([&](auto step) {
        std::uint32_t b[4];
        ldmatrix_x4_trans<step_offset(pair) + step * Order::kRowsOf16 * kRowBytes>(b,
                                                                                   columns ^ Order::bits(pair, step));
        multiply_step<Op>(acc[2 * pair], a.step[step], b[0], b[1]);
        multiply_step<Op>(acc[2 * pair + 1], a.step[step], b[2], b[3]);
      });
    });
  } else {
    // Steps of 3xTF32 are added in binary32: first to one another, for each that is added to the much larger sum of all
    // tiles loses more.
    constexpr bool kApart = kStepByStep<Op> && kSteps > 2;
    static_for<kTiles>([&](auto tile) {
      float apart[4] = {};
      float (&sum)[4] = kApart ? apart : acc[tile];
      static_for<kSteps>([&](auto step) {
        if (kStepByStep<Op> && never(tile * kSteps + step)) return;
        constexpr int kBits = Order::bits(tile, step / 2), kRow = step * (Order::kRowsOf16 / 2);
        const std::uint32_t b0 = load_shared_32<step_offset(tile) + kRow * kRowBytes>(columns ^ kBits);
        // Odd rows have their chunks exchanged.
        const std::uint32_t b1 = load_shared_32<step_offset(tile) + (kRow + 1) * kRowBytes>(columns ^ (kBits ^ 16));
        multiply_step<Op>(sum, a.step[step], b0, b1);
      });
      if constexpr (kApart) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[tile][i] += apart[i];
      }
    });
  }
}

// The same of several times 16 rows, an accumulator and an operand each.
template <typename Op, int kRowBytes, typename Order = RowOrder, int kGroups, int kTiles, int kSteps>
__device__ inline void gemm_ab_groups(float (&acc)[kGroups][kTiles][4], const OperandA<kSteps> (&a)[kGroups],
                                      SharedAddress columns) {
  static_assert(kIs16Bit<Op>);
  static_for<kTiles / 2>([&](auto pair) {
    static_for<kSteps>([&](auto step) {
      std::uint32_t b[4];
      ldmatrix_x4_trans<step_offset(pair) + step * Order::kRowsOf16 * kRowBytes>(b, columns ^ Order::bits(pair, step));
      static_for<kGroups>([&](auto group) {
        multiply_step<Op>(acc[group][2 * pair], a[group].step[step], b[0], b[1]);
        multiply_step<Op>(acc[group][2 * pair + 1], a[group].step[step], b[2], b[3]);
      });
    });
  });
}

}  // namespace mfx::device
