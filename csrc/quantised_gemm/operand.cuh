// Quantised matrices as the right operand of tile/block_gemm.cuh's loop. Bytes are copied to shared memory as they lie
// and become fragments of mma in registers.
//
// A lane reads eight neighbouring bytes of a row: column 8 g + j of a warp's 64 is column g of mma's block j. So a lane
// holds sums of sixteen neighbouring columns, those from 16 c on, g and c being lane / 4 and lane % 4.
#pragma once

#include "grouped_gemm/slice_loader.cuh"
#include "moduleformer_ext/quantised_gemm.hpp"
#include "quantised_gemm/widen.cuh"
#include "tile/static_for.cuh"

namespace mfx::quantised {

using device::SharedAddress;
using grouped::AccTile;

inline constexpr int kPanel = static_cast<int>(kQuantisedPanel), kGroup = static_cast<int>(kQuantisedGroup);

// A block's shape whose stages have, behind x, bytes and with 4 bits scales.
template <typename Base, int kBits_>
struct Shape : Base {
  static constexpr int kBits = kBits_, kNumbers = 8 / kBits;  // rows in a row of bytes
  static constexpr int kSliceDepth = Base::kDepthBytes / 2, kByteRows = kSliceDepth / kNumbers;
  static constexpr int kParts = Base::kColumns / kPanel;  // of as many columns as a panel, a warp's each
  static constexpr int kPartBytes = kByteRows * kPanel, kValueBytes = kParts * kPartBytes;
  static constexpr int kGroups = kBits == 4 ? kSliceDepth / kGroup : 0;
  static constexpr int kScaleRowBytes = kPanel * 2, kScaleBytes = kParts * kGroups * kScaleRowBytes;
  static constexpr int kBBytes = kValueBytes + kScaleBytes;
  static constexpr int kStageBytes = Base::kABytes + kBBytes, kPipelineBytes = Base::kStages * kStageBytes;
  static_assert(Base::kColumnsPerWarp == kPanel, "a lane reads eight bytes of a row");
};

// How a part's rows of bytes lie: a lane's c is the row of bytes i (4 bits) or two rows, 2 i and 2 i + 1 (8 bits). The
// rows of c and c + 1 lie in different halves of 128 bytes, and those of c and c + 2 have their chunks exchanged, so
// that the lanes of a read meet all banks.
template <int kBits>
struct ByteTile {
  // Where row `row` lies, in rows.
  static __device__ int place_of_row(int row) { return kBits == 4 ? row : (row & ~3) + (row & 1) * 2 + (row >> 1 & 1); }
  // Its inverse, which is itself.
  static __device__ int row_at(int place) { return place_of_row(place); }
  static __device__ int offset(int place, int chunk) {
    const int exchanged = (kBits == 4 ? place >> 1 : place >> 2) & 1;
    return place * kPanel + ((chunk ^ exchanged * 2) << 4);
  }
};

// Where the matrices of all experts lie.
struct Matrices {
  const char *values, *scales;
  std::int32_t panels, byte_rows, scale_rows;  // of an expert; of a panel

  // Of a column of an expert, or null beyond its last panel.
  __device__ const char* value_column(int expert, int column) const {
    if (column >= panels * kPanel) return nullptr;
    return values + (std::int64_t{expert} * panels + column / kPanel) * byte_rows * kPanel + column % kPanel;
  }
  __device__ const char* scale_column(int expert, int column, int element_bytes) const {
    if (column >= panels * kPanel) return nullptr;
    return scales +
           ((std::int64_t{expert} * panels + column / kPanel) * scale_rows * kPanel + column % kPanel) * element_bytes;
  }
};

// Bytes, and with 4 bits the scales of their groups, slice after slice, zeros beyond the last panel and row.
template <typename Shape>
class Loader {
  using Tile = ByteTile<Shape::kBits>;
  static constexpr int kChunks = kPanel / 16, kPartChunks = Shape::kByteRows * kChunks;
  static constexpr int kPasses = Shape::kParts * kPartChunks / Shape::kThreads;
  static constexpr int kScaleChunks = Shape::kScaleRowBytes / 16;
  static_assert(kPasses >= 1 && kPasses * Shape::kThreads == Shape::kParts * kPartChunks, "all threads copy");
  static_assert(Shape::kScaleBytes / 16 <= Shape::kThreads, "a thread copies a chunk of scales at most");

 public:
  // column_of(i): the matrix's column that is the tile's column i.
  template <typename ColumnOf>
  __device__ Loader(const Matrices& matrices, int expert, ColumnOf column_of)
      : byte_rows_(matrices.byte_rows), scale_rows_(matrices.scale_rows) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int index = thread + i * Shape::kThreads, chunk = index % kChunks;
      const char* const column = matrices.value_column(expert, column_of(index / kPartChunks * kPanel + chunk * 16));
      row_[i] = column != nullptr ? Tile::row_at(index % kPartChunks / kChunks) : byte_rows_;
      from_[i] = column != nullptr ? column + std::int64_t{row_[i]} * kPanel : matrices.values;
    }
    to_ = Tile::offset(thread / kChunks, thread % kChunks);
    if constexpr (Shape::kBits == 4) {
      const int part = thread / (Shape::kGroups * kScaleChunks), chunk = thread % kScaleChunks;
      const char* column = nullptr;
      if (thread < Shape::kScaleBytes / 16) {
        column = matrices.scale_column(expert, column_of(part * kPanel + chunk * 8), 2);
      }
      group_ = thread / kScaleChunks % Shape::kGroups;
      scale_from_ = column != nullptr ? column + std::int64_t{group_} * Shape::kScaleRowBytes : matrices.scales;
      if (column == nullptr) group_ = scale_rows_;
    }
  }

  template <bool kWhole>
  __device__ void load(SharedAddress slice) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool there = row_[i] < byte_rows_;
      device::cp_async<16>(slice + to_ + i * Shape::kThreads * 16, there ? from_[i] : from_[0], there ? 16 : 0);
      from_[i] += Shape::kPartBytes;
      row_[i] += Shape::kByteRows;
    }
    if constexpr (Shape::kBits == 4) {
      if (threadIdx.x < Shape::kScaleBytes / 16) {
        device::cp_async<16>(slice + Shape::kValueBytes + threadIdx.x * 16, scale_from_, group_ < scale_rows_ ? 16 : 0);
        scale_from_ += Shape::kGroups * Shape::kScaleRowBytes;
        group_ += Shape::kGroups;
      }
    }
  }

 private:
  const char* from_[kPasses];
  const char* scale_from_ = nullptr;
  std::int32_t row_[kPasses];
  int byte_rows_, scale_rows_, group_ = 0;
  std::uint32_t to_;
};

// A warp's part of the product of one slice, as tile/block_gemm.cuh's WarpGemm. With 4 bits the sums of a group are
// scaled when it is complete.
template <typename Op, typename Shape>
class WarpGemm {
  using ReaderA = device::FragmentReader<Op, device::Major::kK, device::Side::kA, Shape::kRows, Shape::kDepthBytes>;
  using Tile = ByteTile<Shape::kBits>;
  static constexpr int kBits = Shape::kBits, kStepRows = device::kStepElements<Op>;
  static constexpr int kStepsPerWarp = Shape::kSteps / Shape::kWarpDepth;
  static constexpr int kStepBytes = kStepRows / Shape::kNumbers * kPanel;
  static constexpr int kStepsOfGroup = kGroup / kStepRows;
  static_assert(kBits == 8 || kStepsPerWarp % kStepsOfGroup == 0, "a group is one warp's");

 public:
  static constexpr int kSliceDepth = Shape::kSliceDepth;

  __device__ WarpGemm() : a_(Shape::warp_row(), Shape::warp_depth() * kStepsPerWarp) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, part = Shape::warp_column() / kPanel;
    values_ = Shape::kABytes + part * Shape::kPartBytes + Shape::warp_depth() * kStepsPerWarp * kStepBytes +
              Tile::offset(Tile::place_of_row(kBits == 4 ? c : 2 * c), g / 2) + g % 2 * 8;
    if constexpr (kBits == 4) {
      scales_ = Shape::kABytes + Shape::kValueBytes +
                (part * Shape::kGroups + Shape::warp_depth() * kStepsPerWarp / kStepsOfGroup) * Shape::kScaleRowBytes +
                c * 32;
    }
  }

  __device__ void operator()(AccTile<Shape>& acc, SharedAddress stage, int rows, int depth) const {
    if (rows <= 0) return;
    const int steps = (depth + kStepRows - 1) / kStepRows - Shape::warp_depth() * kStepsPerWarp;
    if constexpr (kBits == 8) {
#pragma unroll
      for (int step = 0; step < kStepsPerWarp; ++step) {
        if (step < steps) multiply(acc, stage, rows, step);
      }
    } else {
#pragma unroll 1
      for (int first = 0; first < kStepsPerWarp && first < steps; first += kStepsOfGroup) {
        AccTile<Shape> sums;
#pragma unroll
        for (int step = 0; step < kStepsOfGroup; ++step) {
          if (first + step < steps) multiply(sums, stage, rows, first + step);
        }
        add_scaled(acc, sums, stage + scales_ + first / kStepsOfGroup * Shape::kScaleRowBytes);
      }
    }
  }

  // acc <- acc * scales of its columns; with 4 bits nothing is left to do. column_of as in Loader.
  template <typename ColumnOf>
  static __device__ void finish(AccTile<Shape>& acc, const Matrices& matrices, int expert, ColumnOf column_of) {
    if constexpr (kBits == 8) {
      const char* const from = matrices.scale_column(
          expert, column_of(Shape::warp_column() + static_cast<int>(threadIdx.x) % 4 * 16), sizeof(float));
      if (from == nullptr) return;  // columns that do not exist
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          const uint4 words = device::load_global_128_constant(from + (side * 8 + j) * 4);
          const float scale[4] = {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                                  __uint_as_float(words.w)};
#pragma unroll
          for (int i = 0; i < Shape::kRowBlocks; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              acc.c[i][j + k][side] *= scale[k];
              acc.c[i][j + k][2 + side] *= scale[k];
            }
          }
        }
      }
    }
  }

 private:
  __device__ void multiply(AccTile<Shape>& acc, SharedAddress stage, int rows, int step) const {
    device::Fragment<Op, 4> a[Shape::kRowBlocks];
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
      if (i == 0 || i * 16 < rows) a[i] = a_.read(stage, i, step);
    }
    const SharedAddress at = stage + values_ + step * kStepBytes;
    constexpr int kHalfStep = kStepBytes / 2;
    if constexpr (kBits == 8) {
      // The row after the lane's first lies two places further on.
      const uint2 rows_of[4] = {device::load_shared_64(at), device::load_shared_64<2 * kPanel>(at),
                                device::load_shared_64<kHalfStep>(at),
                                device::load_shared_64<kHalfStep + 2 * kPanel>(at)};
      const auto of = [&](auto column, int first) {
        const uint2 &x = rows_of[first], &y = rows_of[first + 1];
        return bytes_to_pair<Op>(column < 4 ? byte_of_each<column % 4>(x.x, y.x) : byte_of_each<column % 4>(x.y, y.y));
      };
      multiply_columns(acc, a, rows, of);
    } else {
      const uint2 rows_of[2] = {device::load_shared_64(at), device::load_shared_64<kHalfStep>(at)};
      const auto of = [&](auto column, int first) {
        const std::uint32_t x = column < 4 ? rows_of[first / 2].x : rows_of[first / 2].y;
        return nibbles_to_pair<Op>(byte_of_each<column % 4>(x, x >> 4));
      };
      multiply_columns(acc, a, rows, of);
    }
  }

  template <typename PairOf>
  static __device__ void multiply_columns(AccTile<Shape>& acc, const device::Fragment<Op, 4> (&a)[Shape::kRowBlocks],
                                          int rows, PairOf of) {
    device::static_for<8>([&](auto column) {
      const device::Fragment<Op, 2> b = {{of(column, 0), of(column, 2)}};
#pragma unroll
      for (int i = 0; i < Shape::kRowBlocks; ++i) {
        if (i == 0 || i * 16 < rows) device::multiply<Op>(acc.c[i][column], a[i], b, 0);
      }
    });
  }

  static __device__ void add_scaled(AccTile<Shape>& acc, const AccTile<Shape>& sums, SharedAddress scales) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float scale[8];
      device::unpack_chunk<Float16>(device::load_shared_128(scales + side * 16), scale);
#pragma unroll
      for (int i = 0; i < Shape::kRowBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          acc.c[i][j][side] += sums.c[i][j][side] * scale[j];
          acc.c[i][j][2 + side] += sums.c[i][j][2 + side] * scale[j];
        }
      }
    }
  }

  ReaderA a_;
  std::uint32_t values_, scales_ = 0;
};

// How a lane's sums lie in shared memory for grouped_gemm/epilogue.cuh: chunks of four columns, of which those of c >=
// 2 are exchanged in pairs, so that a store meets all banks.
struct LaneOfSixteen {
  static constexpr __device__ int chunk(int chunk) { return chunk ^ (chunk >> 3 & 1); }

  template <int kPitch>
  static __device__ int begin() {
    return static_cast<int>(threadIdx.x) % 32 / 4 * kPitch;
  }
  template <int kPitch, int kBlocks>
  static __device__ void store(const float (&c)[kBlocks][4], SharedAddress to) {
    static_assert(kBlocks == 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int side = i / 2, j = i % 2 * 4;
      const SharedAddress at = to + chunk(static_cast<int>(threadIdx.x) % 4 * 4 + i) * 16;
      const auto bits = [&](int row) -> uint4 {
        return {__float_as_uint(c[j][row + side]), __float_as_uint(c[j + 1][row + side]),
                __float_as_uint(c[j + 2][row + side]), __float_as_uint(c[j + 3][row + side])};
      };
      device::store_shared_128(at, bits(0));
      device::store_shared_128<8 * kPitch * 4>(at, bits(2));
    }
  }
};

}  // namespace mfx::quantised
