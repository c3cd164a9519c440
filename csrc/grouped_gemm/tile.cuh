// The shape of one block's work, and how its operands lie in shared memory.
//
// A block of 4 warps computes kRows x kColumns of a result. Depth (the summed dimension) arrives in slices of
// kDepthBytes per row. An operand's slice is stored as it lies in global memory, in one of two ways:
//   Major::kK   one row per row (or column) of the result, depth contiguous
//   Major::kMN  one row per element of depth, rows (or columns) of the result contiguous
// 16-byte chunks of a row are exchanged by XOR with its index so that no access meets a bank conflict.
#pragma once

#include "grouped_gemm/operand_math.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/regalloc.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/vector_memory.cuh"

namespace mfx::grouped {

using device::SharedAddress;

enum class Major { kK, kMN };
enum class Side { kA, kB };

template <int kRows_, int kColumns_, int kWarpRows, int kWarpColumns, int kWarpDepth_, int kDepthBytes_, int kStages_,
          int kBlocksPerSm_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpDepth = kWarpDepth_;  // warps that share a piece of the result and split the depth
  static constexpr int kWarps = kWarpRows * kWarpColumns * kWarpDepth, kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = kRows / kWarpRows, kColumnsPerWarp = kColumns / kWarpColumns;
  static constexpr int kRowBlocks = kRowsPerWarp / 16, kColumnBlocks = kColumnsPerWarp / 8;  // of mma's size
  static constexpr int kDepthBytes = kDepthBytes_, kSteps = kDepthBytes / 32;                // mma's depth: 32 bytes
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kABytes = kRows * kDepthBytes, kBBytes = kColumns * kDepthBytes;
  static constexpr int kStageBytes = kABytes + kBBytes, kPipelineBytes = kStages * kStageBytes;

  // Warps are numbered depth first, then columns, then rows.
  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ int warp_depth() { return warp() % kWarpDepth; }
  static __device__ int warp_column() { return warp() / kWarpDepth % kWarpColumns * kColumnsPerWarp; }
  static __device__ int warp_row() { return warp() / (kWarpDepth * kWarpColumns) * kRowsPerWarp; }
};

using LargeTile = Tile<128, 128, 2, 2, 1, 64, 4, 2>;
using MediumTile = Tile<64, 128, 1, 4, 1, 128, 3, 2>;
// Few rows per expert: the matrix streams through, and its depth is all there is to divide between the warps.
using SmallTile = Tile<16, 32, 1, 1, 4, 256, 4, 4>;

// One operand's slice in shared memory: kSpan rows or columns of the result.
template <typename Math, Major kMajor, int kSpan, int kDepthBytes>
struct Slice {
  using T = typename Math::T;
  static constexpr int kDepth = kDepthBytes / sizeof(T);
  static constexpr int kRowBytes = kMajor == Major::kK ? kDepthBytes : kSpan * static_cast<int>(sizeof(T));
  static constexpr int kRows = kMajor == Major::kK ? kSpan : kDepth;
  // ldmatrix cannot transpose 32-bit elements: those are read one by one, by four rows at a time.
  static constexpr bool kWords = kMajor == Major::kMN && sizeof(T) == 4;
  static_assert(kRowBytes >= (kWords ? 128 : 64), "the banks must be covered");

  static __device__ std::uint32_t offset(int row, int chunk) {
    const int exchange = kWords ? 2 * (row & 3) : kRowBytes >= 128 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ exchange) << 4);
  }
};

// Reads mma fragments of 16 rows (or columns) by 32 bytes of depth from a slice.
template <typename Math, Major kMajor, Side kSide, int kSpan, int kDepthBytes>
class FragmentReader {
  using S = Slice<Math, kMajor, kSpan, kDepthBytes>;
  static constexpr int kElement = sizeof(typename Math::T);
  static constexpr int kStepRows = 32 / kElement;  // of depth

 public:
  // `origin`: the warp's first row or column; `first_step`: its first piece of the slice's depth.
  __device__ FragmentReader(int origin, int first_step) {
    const int lane = threadIdx.x % 32;
    if constexpr (S::kWords) {
      const int column = lane >> 2;
      offset_ = S::offset(lane & 3, column >> 2) + (column & 3) * 4;
      offset_ = (offset_ ^ (origin * kElement)) + first_step * kStepRows * S::kRowBytes;
    } else {
      // Matrices 1 and 2 of ldmatrix.x4 are the other eight rows and the other half of the depth, or vice versa.
      constexpr bool kRowsFirst = (kMajor == Major::kK) == (kSide == Side::kA);
      const int row = kRowsFirst ? lane & 15 : (lane & 7) | (lane >> 4 << 3);
      const int chunk = kRowsFirst ? lane >> 4 : lane >> 3 & 1;
      offset_ = S::offset(row, chunk);
      if constexpr (kMajor == Major::kK) {
        offset_ = (offset_ + origin * S::kRowBytes) ^ (first_step * 32);
      } else {
        offset_ = (offset_ ^ (origin * kElement)) + first_step * kStepRows * S::kRowBytes;
      }
    }
    device::pin_in_register(offset_);
  }

  // Rows (columns) 16 * block and further, `step` being counted from the warp's first.
  __device__ typename Math::Operand read(SharedAddress slice, int block, int step) const {
    std::uint32_t r[4];
    if constexpr (kMajor == Major::kK) {
      device::ldmatrix_x4(r, ((slice + offset_) ^ (step * 32)) + block * 16 * S::kRowBytes);
    } else {
      const SharedAddress at = ((slice + offset_) ^ (block * 16 * kElement)) + step * kStepRows * S::kRowBytes;
      if constexpr (S::kWords) {
        const SharedAddress right = at ^ 32;  // eight columns further
        const int below = 4 * S::kRowBytes;   // half a step deeper
        r[0] = device::load_shared_32(at);
        r[3] = device::load_shared_32(right + below);
        r[kSide == Side::kA ? 1 : 2] = device::load_shared_32(right);
        r[kSide == Side::kA ? 2 : 1] = device::load_shared_32(at + below);
      } else {
        device::ldmatrix_x4_trans(r, at);
      }
    }
    return Math::operand(r);
  }

 private:
  std::uint32_t offset_;
};

}  // namespace mfx::grouped
