// Products of a warpgroup of sm_90a with boxes in shared memory: what gemm_abt() and gemm_ab() of tile_product.cuh are
// to a warp of sm_80. They are ordered in groups; until that has been waited for, accumulators and operands are
// theirs. Accumulators [64, 8 kTiles] are those of four warps, 16 rows each, and so are fragments of A.
//
// A of A B^T comes from shared memory, for the whole loop: ptxas 13.0 gives registers that such a product has read to
// others, even where a later turn of the loop reads them again.
#pragma once

#include <utility>

#include "moduleformer_ext/common.hpp"
#include "tile/static_for.cuh"
#include "tile/tile_product.cuh"
#include "tile/warpgroup_boxes.cuh"

namespace mfx::device {

// wgmma with 8 kTiles columns.
template <typename Op, int kTiles>
struct WarpgroupAtoms;

#define MFX_WARPGROUP_ATOMS(Op, tiles, atom)                                                           \
  template <>                                                                                          \
  struct WarpgroupAtoms<Op, tiles> {                                                                   \
    using Abt = cute::SM90::GMMA::atom##_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;   \
    using Ab = cute::SM90::GMMA::atom##_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>;   \
    using Atb = cute::SM90::GMMA::atom##_SS<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN>; \
  };
MFX_WARPGROUP_ATOMS(BFloat16, 4, MMA_64x32x16_F32BF16BF16)
MFX_WARPGROUP_ATOMS(BFloat16, 8, MMA_64x64x16_F32BF16BF16)
MFX_WARPGROUP_ATOMS(BFloat16, 16, MMA_64x128x16_F32BF16BF16)
MFX_WARPGROUP_ATOMS(BFloat16, 32, MMA_64x256x16_F32BF16BF16)
MFX_WARPGROUP_ATOMS(Float16, 4, MMA_64x32x16_F32F16F16)
MFX_WARPGROUP_ATOMS(Float16, 8, MMA_64x64x16_F32F16F16)
MFX_WARPGROUP_ATOMS(Float16, 16, MMA_64x128x16_F32F16F16)
MFX_WARPGROUP_ATOMS(Float16, 32, MMA_64x256x16_F32F16F16)
#undef MFX_WARPGROUP_ATOMS

// Orders what is done to an accumulator's registers with the products, for the compiler.
template <int kTiles>
__device__ inline void fence_acc(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) cute::warpgroup_fence_operand(acc[i / 4][i % 4]);
}

// Orders what order() orders as one group, of products whose accumulators are `acc`.
template <typename Order, int... kTiles>
__device__ inline void order_group(Order&& order, float (&... acc)[kTiles][4]) {
  (fence_acc(acc), ...);
  cute::warpgroup_arrive();
  order();
  cute::warpgroup_commit_batch();
  (fence_acc(acc), ...);
}

template <typename Atom, int kTiles, std::size_t... kIndex>
__device__ inline void multiply_shared(float (&acc)[kTiles][4], std::uint64_t a, std::uint64_t b,
                                       cute::SM90::GMMA::ScaleOut add, std::index_sequence<kIndex...>) {
  Atom::fma(a, b, acc[kIndex / 4][kIndex % 4]..., add);
}
template <typename Atom, int kTiles, std::size_t... kIndex>
__device__ inline void multiply_ab(float (&acc)[kTiles][4], const FragmentA& a, std::uint64_t b,
                                   std::index_sequence<kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, acc[kIndex / 4][kIndex % 4]...);
}

// acc = A B^T over kDepth columns of both, whose boxes have 64 rows and 8 kTiles or, where only part of these is taken,
// kBRows. For an order_group().
template <typename Op, int kDepth, int kBRows = 0, int kTiles>
__device__ inline void multiply_abt(float (&acc)[kTiles][4], SharedAddress a_boxes, SharedAddress b_boxes) {
  using cute::SM90::GMMA::ScaleOut;
  constexpr int kABox = 64 * kBoxRowBytes, kBBox = (kBRows == 0 ? 8 * kTiles : kBRows) * kBoxRowBytes;
  const std::uint64_t a = box_descriptor<Major::kK, kABox>(a_boxes), b = box_descriptor<Major::kK, kBBox>(b_boxes);
  static_for<kDepth / 16>([&](auto step) {
    multiply_shared<typename WarpgroupAtoms<Op, kTiles>::Abt>(
        acc, a + step_bytes<Major::kK, kABox>(step) / 16, b + step_bytes<Major::kK, kBBox>(step) / 16,
        step == 0 ? ScaleOut::Zero : ScaleOut::One, std::make_index_sequence<4 * kTiles>());
  });
}

// acc += A^T B, of 64 columns of A, where inner elements are rows of both's boxes, kDepth. For an order_group().
template <typename Op, int kDepth, int kTiles>
__device__ inline void multiply_atb(float (&acc)[kTiles][4], SharedAddress a_box, SharedAddress b_boxes) {
  constexpr int kBox = kDepth * kBoxRowBytes;
  const std::uint64_t a = box_descriptor<Major::kMN, kBox>(a_box), b = box_descriptor<Major::kMN, kBox>(b_boxes);
  static_for<kDepth / 16>([&](auto step) {
    constexpr int kStep = step_bytes<Major::kMN, kBox>(step) / 16;
    multiply_shared<typename WarpgroupAtoms<Op, kTiles>::Atb>(
        acc, a + kStep, b + kStep, cute::SM90::GMMA::ScaleOut::One, std::make_index_sequence<4 * kTiles>());
  });
}

// acc = A B^T, as a group of its own.
template <typename Op, int kDepth, int kTiles>
__device__ inline void order_abt(float (&acc)[kTiles][4], SharedAddress a_boxes, SharedAddress b_boxes) {
  order_group([&] { multiply_abt<Op, kDepth>(acc, a_boxes, b_boxes); }, acc);
}

// acc += A B, where inner elements are rows of B's boxes.
template <typename Op, int kTiles, int kSteps>
__device__ inline void order_ab(float (&acc)[kTiles][4], const OperandA<kSteps>& a, SharedAddress b_boxes) {
  constexpr int kBox = 16 * kSteps * kBoxRowBytes;
  const std::uint64_t b = box_descriptor<Major::kMN, kBox>(b_boxes);
  const auto order = [&] {
    static_for<kSteps>([&](auto step) {
      multiply_ab<typename WarpgroupAtoms<Op, kTiles>::Ab>(
          acc, a.step[step], b + step_bytes<Major::kMN, kBox>(step) / 16, std::make_index_sequence<4 * kTiles>());
    });
  };
  order_group(order, acc);
}

}  // namespace mfx::device
