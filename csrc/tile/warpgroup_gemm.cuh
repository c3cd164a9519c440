// acc += A B by a warpgroup of sm_90a, from shared memory: what the WarpGemm of block_gemm.cuh is to sm_80.
//
// A slice is 64 deep. Each operand's part of it is made of boxes of 64 rows (warpgroup_boxes.cuh).
#pragma once

#include <utility>

#include "moduleformer_ext/common.hpp"
#include "tile/slice_ring.cuh"
#include "tile/warpgroup_boxes.cuh"
#include "tile/warpgroup_roles.cuh"

namespace mfx::device {

// 128 x 128 results of one warpgroup, of two that multiply beside one that loads.
struct WarpgroupShape {
  static constexpr int kRows = 128, kColumns = 128, kDepth = 64, kDepthBytes = 128, kStages = 5;
  static constexpr int kRowBlocks = kRows / 64;  // of wgmma's height
  static constexpr int kThreads = kWarpgroup;    // that load, and that multiply one tile
  static constexpr int kConsumers = kMultiplyingWarpgroups, kBlockThreads = kRolesThreads, kBlocksPerSm = 1;
  static constexpr int kBox = 64, kBoxBytes = kBox * kBoxRowBytes;
  static constexpr int kABytes = kRows * kDepthBytes, kBBytes = kColumns * kDepthBytes;
  static constexpr int kStageBytes = kABytes + kBBytes, kPipelineBytes = kStages * kStageBytes;
  using Barriers = RingBarriers<kStages, kConsumers>;
  using Producer = RingProducer<Barriers>;
  using Consumer = RingConsumer<kStages, kConsumers>;
};

// Boxes side by side, for those who write them chunk by chunk. Of Major::kK they are as SmemTile has them.
template <typename T, int kSpan>
struct SliceOf<WarpgroupShape, T, Major::kMN, kSpan> {
  struct Tile {
    static constexpr int kDepth = WarpgroupShape::kDepth;
    static constexpr int kRowBytes = kSpan * static_cast<int>(sizeof(T));
    static constexpr int kRowPitch = 128, kGroupPitch = WarpgroupShape::kBoxBytes;
    static __device__ constexpr std::uint32_t offset(int row, int chunk) {
      return chunk / 8 * kGroupPitch + swizzled_offset<128>(row, chunk % 8);
    }
  };
};

// Of the m64n128 of each block of rows: thread t of the warpgroup has in c[block][4 j + 2 h + i] row
// 64 block + 16 (t / 32) + 8 h + t % 32 / 4, column 8 j + 2 (t % 4) + i.
struct WarpgroupAcc {
  float c[WarpgroupShape::kRowBlocks][WarpgroupShape::kColumns / 2] = {};

  // Orders what is done to the registers with the products, for the compiler.
  __device__ void fence() {
#pragma unroll
    for (auto& block : c) {
#pragma unroll
      for (float& x : block) cute::warpgroup_fence_operand(x);
    }
  }
};

template <typename Op, Major kA, Major kB>
class WarpgroupGemm {
  using Shape = WarpgroupShape;
  using Atom = std::conditional_t<std::is_same_v<Op, BFloat16>,
                                  cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<kGmmaMajor<kA>, kGmmaMajor<kB>>,
                                  cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<kGmmaMajor<kA>, kGmmaMajor<kB>>>;
  static_assert(kIs16Bit<Op>, "wgmma takes both majors of 16-bit operands alone");

 public:
  // Orders the product of one slice for the first kBlocks blocks of 64 rows, as one group.
  template <int kBlocks>
  static __device__ void order(WarpgroupAcc& acc, SharedAddress stage) {
    const std::uint64_t a = box_descriptor<kA, Shape::kBoxBytes>(stage);
    const std::uint64_t b = box_descriptor<kB, Shape::kBoxBytes>(stage + Shape::kABytes);
    acc.fence();
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Shape::kDepth / 16; ++step) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply(a + (step_bytes<kA, Shape::kBoxBytes>(step) + block * Shape::kBoxBytes) / 16,
                 b + step_bytes<kB, Shape::kBoxBytes>(step) / 16, acc.c[block],
                 std::make_index_sequence<Shape::kColumns / 2>());
      }
    }
    cute::warpgroup_commit_batch();
    acc.fence();
  }

 private:
  template <std::size_t... kIndex>
  static __device__ void multiply(std::uint64_t a, std::uint64_t b, float (&c)[sizeof...(kIndex)],
                                  std::index_sequence<kIndex...>) {
    Atom::fma(a, b, c[kIndex]...);
  }
};

// A consumer's turn: acc += A B over the next `slices` of the ring. One product is under way while the next slice is
// waited for, and the last one while another consumer begins.
template <typename Gemm, int kBlocks>
__device__ void mainloop(WarpgroupAcc& acc, SharedAddress stages, WarpgroupShape::Consumer& ring, int slices) {
  ring.take_turn();
  int previous = -1;
  for (int i = 0; i < slices; ++i) {
    const int stage = ring.wait();
    Gemm::template order<kBlocks>(acc, stages + stage * WarpgroupShape::kStageBytes);
    cute::warpgroup_wait<1>();
    if (previous >= 0) ring.release(previous);
    previous = stage;
  }
  ring.pass_turn();
  cute::warpgroup_wait<0>();
  acc.fence();
  if (previous >= 0) ring.release(previous);
}

}  // namespace mfx::device
