// The shape of one block's product, and how its operands lie in shared memory.
//
// A block computes kRows x kColumns of a result. Depth (the summed dimension) arrives in slices of kDepthBytes per row.
// An operand's slice is stored in one of two ways:
//   Major::kK   one row per row (or column) of the result, depth contiguous
//   Major::kMN  one row per element of depth, rows (or columns) of the result contiguous
// 16-byte chunks of a row are exchanged by XOR with its index so that no access meets a bank conflict.
#pragma once

#include "ptx/ldmatrix.cuh"
#include "ptx/regalloc.cuh"
#include "ptx/vector_memory.cuh"
#include "tile/operand.cuh"
#include "tile/swizzle.cuh"

namespace mfx::device {

enum class Major { kK, kMN };
enum class Side { kA, kB };

template <int kRows_, int kColumns_, int kWarpRows, int kWarpColumns, int kWarpDepth_, int kDepthBytes_, int kStages_,
          int kBlocksPerSm_>
struct BlockShape {
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

  // How many of its rows a warp has where so many of the block's exist: none where its columns do not.
  static __device__ int rows_of_warp(int rows, int columns) {
    return warp_column() < columns ? min(rows - warp_row(), kRowsPerWarp) : 0;
  }
};

// One operand's slice in shared memory: kSpan rows or columns of the result.
template <typename T, Major kMajor, int kSpan, int kDepthBytes>
struct SmemTile {
  static constexpr int kDepth = kDepthBytes / sizeof(T);
  static constexpr int kRowBytes = kMajor == Major::kK ? kDepthBytes : kSpan * static_cast<int>(sizeof(T));
  static constexpr int kRowPitch = kRowBytes, kGroupPitch = 128;  // from row to row; from eight chunks to the next
  static constexpr int kRows = kMajor == Major::kK ? kSpan : kDepth;
  // ldmatrix cannot transpose 32-bit elements: those are read one by one, by four rows at a time.
  static constexpr bool kWords = kMajor == Major::kMN && sizeof(T) == 4;
  static_assert(kRowBytes >= (kWords ? 128 : 64), "the banks must be covered");

  static __device__ std::uint32_t offset(int row, int chunk) {
    if constexpr (kRowBytes >= 128 && !kWords) {
      return swizzled_offset<kRowBytes>(row, chunk);
    } else {
      return row * kRowBytes + ((chunk ^ (kWords ? 2 * (row & 3) : row >> 1 & 3)) << 4);
    }
  }
};

// How blocks of a shape store an operand's slice.
template <typename Shape, typename T, Major kMajor, int kSpan>
struct SliceOf {
  using Tile = SmemTile<T, kMajor, kSpan, Shape::kDepthBytes>;
};

// Reads mma fragments of 16 rows (or columns) by 32 bytes of depth from a slice.
template <typename Op, Major kMajor, Side kSide, int kSpan, int kDepthBytes>
class FragmentReader {
  using S = SmemTile<typename Storage<Op>::Type, kMajor, kSpan, kDepthBytes>;
  static constexpr int kElement = sizeof(Op);
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
    pin_in_register(offset_);
  }

  // Rows (columns) 16 * block and further, `step` being counted from the warp's first.
  __device__ Fragment<Op, 4> read(SharedAddress slice, int block, int step) const {
    std::uint32_t r[4];
    if constexpr (kMajor == Major::kK) {
      ldmatrix_x4(r, ((slice + offset_) ^ (step * 32)) + block * 16 * S::kRowBytes);
    } else {
      const SharedAddress at = ((slice + offset_) ^ (block * 16 * kElement)) + step * kStepRows * S::kRowBytes;
      if constexpr (S::kWords) {
        const SharedAddress right = at ^ 32;  // eight columns further
        const int below = 4 * S::kRowBytes;   // half a step deeper
        r[0] = load_shared_32(at);
        r[3] = load_shared_32(right + below);
        r[kSide == Side::kA ? 1 : 2] = load_shared_32(right);
        r[kSide == Side::kA ? 2 : 1] = load_shared_32(at + below);
      } else {
        ldmatrix_x4_trans(r, at);
      }
    }
    return to_fragment<Op>(r);
  }

 private:
  std::uint32_t offset_;
};

}  // namespace mfx::device
