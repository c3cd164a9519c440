// C [rows, columns] = A B^T by one block, a tile at a time. Operands (router_operands.cuh) come to shared memory a
// slice of the inner dimension at a time, asynchronously where they are stored as they are multiplied, else through
// registers, so that one product serves every storage type and segmentation. Op is what the tensor cores multiply:
// BFloat16, Float16, or float as three tf32 products (tile/operand.cuh).
#pragma once

#include <cstdint>

#include "route_topk/router_operands.cuh"
#include "tile/block_gemm.cuh"
#include "tile/chunk.cuh"
#include "tile/static_for.cuh"

namespace mfx::router {

inline constexpr int kThreads = 128;

// The first `here` of a chunk's elements from `at` on, as Op, and zeros.
template <typename Op>
__device__ uint4 convert_chunk(const void* line, DType dtype, int at, int here) {
  constexpr int kElements = 16 / sizeof(Op);
  float values[kElements];
  if (sizeof(Op) == 4 && dtype != DType::kFloat32 && here == kElements) {
    const void* const from = static_cast<const char*>(line) + std::int64_t{at} * 2;
    if (reinterpret_cast<std::uintptr_t>(from) % 8 == 0) {
      const uint2 words = *static_cast<const uint2*>(from);
      const bool bf16 = dtype == DType::kBFloat16;
      const auto low = [&](std::uint32_t w) {
        return bf16 ? device::low_of_pair<BFloat16>(w) : device::low_of_pair<Float16>(w);
      };
      const auto high = [&](std::uint32_t w) {
        return bf16 ? device::high_of_pair<BFloat16>(w) : device::high_of_pair<Float16>(w);
      };
      return {__float_as_uint(low(words.x)), __float_as_uint(high(words.x)), __float_as_uint(low(words.y)),
              __float_as_uint(high(words.y))};
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) values[i] = i < here ? load(line, dtype, at + i) : 0.0f;
  if constexpr (sizeof(Op) == 2) {
    return {device::pack_pair<Op>(values[0], values[1]), device::pack_pair<Op>(values[2], values[3]),
            device::pack_pair<Op>(values[4], values[5]), device::pack_pair<Op>(values[6], values[7])};
  } else {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  }
}

// Copies an operand's slices one after the other, kSpan rows from row0 on, up to the inner index `end`.
template <typename Op, int kSpan, int kDepthBytes, typename Source>
class OperandCopy {
  using Tile = device::SmemTile<Op, Source::kMajor, kSpan, kDepthBytes>;
  static constexpr bool kAlongK = Source::kMajor == device::Major::kK;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(Op)), kDepth = Tile::kDepth;
  static constexpr int kChunks = Tile::kRowBytes / 16, kOfTile = Tile::kRows * kChunks;
  static constexpr int kLinesAtOnce = kThreads / kChunks;
  static_assert(kLinesAtOnce % (Tile::kWords ? 4 : 8) == 0, "a thread's chunks are a constant distance apart");

 public:
  __device__ OperandCopy(const Source& source, int row0, int rows, int end, int k0)
      : source_(source),
        row0_(row0),
        rows_(rows),
        end_(end),
        place_(Tile::offset(first_line(), first_chunk())),
        as_stored_(source.dtype == kDTypeOf<Op> && source.is_aligned()),
        whole_(as_stored_ && source.is_one_piece() && row0 + kSpan <= rows),
        from_(static_cast<const char*>(source.line(first_line() + (kAlongK ? row0 : k0))) +
              (first_chunk() * kElements + (kAlongK ? k0 : row0)) * static_cast<std::int64_t>(sizeof(Op))) {}

  __device__ void operator()(device::SharedAddress to, int left) {
    if (whole_ && left >= kDepth) {
      const char* from = from_;
      const std::int64_t step = source_.line_bytes() * kLinesAtOnce;
      device::static_for<(kOfTile + kThreads - 1) / kThreads>([&](auto i) {
        if (kOfTile >= kThreads || threadIdx.x < kOfTile) {
          device::cp_async<16, i * kLinesAtOnce * Tile::kRowBytes>(to + place_, from);
        }
        from += step;
      });
    } else if (as_stored_) {
      for_each_chunk(to, end_ - left, [&](device::SharedAddress place, int line, int at, int here) {
        device::cp_async<16>(place, static_cast<const Op*>(source_.line(line)) + at,
                             here * static_cast<int>(sizeof(Op)));
      });
    } else {
      for_each_chunk(to, end_ - left, [&](device::SharedAddress place, int line, int at, int here) {
        device::store_shared_128(place, convert_chunk<Op>(source_.line(line), source_.dtype, at, here));
      });
    }
    from_ += kAlongK ? std::int64_t{kDepthBytes} : source_.line_bytes() * kDepth;
  }

 private:
  static __device__ int first_line() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ int first_chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

  // f(where it belongs, its line, its first element, how many elements there are within the operand's edges)
  template <typename F>
  __device__ void for_each_chunk(device::SharedAddress to, int k0, F f) const {
    const int lines = kAlongK ? rows_ : end_, length = kAlongK ? end_ : rows_;
    const int at = (kAlongK ? k0 : row0_) + first_chunk() * kElements;
    const int here = max(min(length - at, kElements), 0);
#pragma unroll 1
    for (int row = first_line(); row < Tile::kRows; row += kLinesAtOnce) {
      const int line = (kAlongK ? row0_ : k0) + row;
      f(to + place_ + (row - first_line()) * Tile::kRowBytes, line, at, line < lines ? here : 0);
    }
  }

  const Source& source_;
  const int row0_, rows_, end_;
  const std::uint32_t place_;     // of this thread's first chunk
  const bool as_stored_, whole_;  // multiplied as it is in memory; and all of its rows exist, in one piece
  const char* from_;              // this thread's first chunk of the next slice
};

template <typename Op, typename Shape, typename A, typename B>
struct OperandLoader {
  OperandCopy<Op, Shape::kRows, Shape::kDepthBytes, A> a;
  OperandCopy<Op, Shape::kColumns, Shape::kDepthBytes, B> b;

  __device__ void load(device::SharedAddress stage, int left) {
    a(stage, left);
    b(stage + Shape::kABytes, left);
  }
};

// What of the result a block computes, and over which inner indices.
struct ProductPart {
  int row, column;    // the tile's first
  int rows, columns;  // of the whole result
  int first, end;     // inner indices
};

// write(row, column, x, y, both) for every pair of neighbours in a row of the tile that lies within the result; of the
// last column, where that has an even index, only x.
template <typename Op, typename Shape, typename A, typename B, typename Write>
__device__ void product_tile(device::SharedAddress tiles, const A& a, const B& b, const ProductPart& part,
                             Write write) {
  static_assert(Shape::kThreads == kThreads);
  const int rows_here = min(part.rows - part.row, Shape::kRows);
  const int columns_here = min(part.columns - part.column, Shape::kColumns);
  device::AccTile<Shape> acc;  // C = A B^T
  device::mainloop(acc, device::WarpGemm<Op, Shape, A::kMajor, B::kMajor>(), tiles,
                   OperandLoader<Op, Shape, A, B>{{a, part.row, part.rows, part.end, part.first},
                                                  {b, part.column, part.columns, part.end, part.first}},
                   part.end - part.first, Shape::rows_of_warp(rows_here, columns_here));
  acc.for_each_pair([&](int row, int column, float x, float y) {
    if (row < rows_here && column < columns_here) {
      write(part.row + row, part.column + column, x, y, column + 1 < columns_here);
    }
  });
}

// All columns of a tile's rows.
template <typename Op, typename Shape, typename A, typename B, typename Write>
__device__ void product_rows(device::SharedAddress tiles, const A& a, const B& b, int row0, int rows, int columns,
                             int inner, Write write) {
  for (int column = 0; column < columns; column += Shape::kColumns) {
    product_tile<Op, Shape>(tiles, a, b, {row0, column, rows, columns, 0, inner}, write);
  }
}

}  // namespace mfx::router
