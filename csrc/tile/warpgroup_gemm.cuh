// acc += A B by a warpgroup of sm_90a, from shared memory: what the WarpGemm of block_gemm.cuh is to sm_80.
//
// A slice is 64 deep. Each operand's part of it is made of boxes, 64 rows of 128 bytes, chunks of 16 bytes exchanged by
// XOR with the row as TMA's 128-byte swizzle does. By Major, a box is
//   kK    64 rows (or columns) of the result, their depth contiguous
//   kMN   64 elements of depth, each with 64 rows (or columns) of the result
// PTX ISA, "Asynchronous warpgroup level matrix instructions", strides of matrix descriptors.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "moduleformer_ext/common.hpp"
#include "tile/slice_ring.cuh"
#include "tile/smem_tile.cuh"

namespace mfx::device {

// 128 x 128 results of one warpgroup, of two that multiply beside one that loads.
struct WarpgroupShape {
  static constexpr int kRows = 128, kColumns = 128, kDepth = 64, kDepthBytes = 128, kStages = 5;
  static constexpr int kRowBlocks = kRows / 64;  // of wgmma's height
  static constexpr int kThreads = kWarpgroup;    // that load, and that multiply one tile
  static constexpr int kConsumers = 2, kBlockThreads = (1 + kConsumers) * kWarpgroup, kBlocksPerSm = 1;
  static constexpr int kBox = 64, kBoxBytes = kBox * 128;
  static constexpr int kABytes = kRows * kDepthBytes, kBBytes = kColumns * kDepthBytes;
  static constexpr int kStageBytes = kABytes + kBBytes, kPipelineBytes = kStages * kStageBytes;
  using Barriers = RingBarriers<kStages, kConsumers>;
  using Producer = RingProducer<kStages, kConsumers>;
  using Consumer = RingConsumer<kStages, kConsumers>;
  // Registers per thread: 72 to load, 216 to multiply, 64512 in all.
  static constexpr int kLoadingRegisters = 72, kMultiplyingRegisters = 216;
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
  static constexpr auto major(Major m) {
    return m == Major::kK ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;
  }
  using Atom = std::conditional_t<std::is_same_v<Op, BFloat16>,
                                  cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<major(kA), major(kB)>,
                                  cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<major(kA), major(kB)>>;
  static_assert(kIs16Bit<Op>, "wgmma takes both majors of 16-bit operands alone");

 public:
  // Orders the product of one slice for the first kBlocks blocks of 64 rows, as one group.
  template <int kBlocks>
  static __device__ void order(WarpgroupAcc& acc, SharedAddress stage) {
    const std::uint64_t a = descriptor<kA>(stage), b = descriptor<kB>(stage + Shape::kABytes);
    acc.fence();
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Shape::kDepth / 16; ++step) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply(a + (step * kStepBytes<kA> + block * Shape::kBoxBytes) / 16, b + step * kStepBytes<kB> / 16,
                 acc.c[block], std::make_index_sequence<Shape::kColumns / 2>());
      }
    }
    cute::warpgroup_commit_batch();
    acc.fence();
  }

 private:
  // Sixteen elements of depth: within a row, or as many rows.
  template <Major kMajor>
  static constexpr int kStepBytes = kMajor == Major::kK ? 32 : 16 * 128;

  template <Major kMajor>
  static __device__ std::uint64_t descriptor(SharedAddress boxes) {
    cute::GmmaDescriptor d;
    d.bitfield.start_address_ = static_cast<std::uint16_t>(boxes >> 4);
    d.bitfield.leading_byte_offset_ = kMajor == Major::kK ? 1 : Shape::kBoxBytes >> 4;  // from box to box
    d.bitfield.stride_byte_offset_ = 8 * 128 >> 4;                                      // from eight rows to the next
    d.bitfield.layout_type_ = static_cast<std::uint8_t>(cute::SM90::GMMA::LayoutType::B128);
    return d;
  }

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
