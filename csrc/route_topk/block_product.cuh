// C [rows, columns] = A B^T by one block, in tiles of 32 x 64 and slices of 128 bytes of the inner dimension. Operands
// (router_operands.cuh) are gathered into shared memory, so that one product serves every storage type, transposition
// and segmentation; other blocks of the processor work while one waits for its operands. Op is what the tensor cores
// multiply: BFloat16, Float16, or float as three tf32 products (tile/operand.cuh).
#pragma once

#include <cstdint>

#include "route_topk/router_operands.cuh"
#include "tile/block_gemm.cuh"

namespace mfx::router {

using Shape = device::BlockShape<32, 64, 2, 2, 1, 128, 1, 5>;

inline constexpr int kThreads = Shape::kThreads;
inline constexpr int kTileRows = Shape::kRows;
inline constexpr int kTileColumns = Shape::kColumns;

struct ProductTiles {
  alignas(1024) char bytes[Shape::kPipelineBytes];
};

// 16 bytes of an operand as Op, zero beyond its edges.
template <typename Op, typename Source>
__device__ uint4 gather_chunk(const Source& source, std::int64_t row, std::int64_t k, std::int64_t rows,
                              std::int64_t inner) {
  constexpr int kElements = 16 / sizeof(Op);
  uint4 chunk = {};
  if (row >= rows || k >= inner) return chunk;
  if (k + kElements <= inner) {
    if (const void* from = source.template chunk<Op>(row, k)) return device::load_global_128(from);
  }
  float values[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) values[i] = k + i < inner ? source(row, k + i) : 0.0f;
  if constexpr (sizeof(Op) == 2) {
    return {device::pack_pair<Op>(values[0], values[1]), device::pack_pair<Op>(values[2], values[3]),
            device::pack_pair<Op>(values[4], values[5]), device::pack_pair<Op>(values[6], values[7])};
  } else {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  }
}

// Copies both operands' slices: of A from row `a_row` on, of B from `b_row` on.
template <typename Op, typename A, typename B>
struct GatherLoader {
  const A& a;
  const B& b;
  std::int64_t a_row, b_row, a_rows, b_rows, inner;

  __device__ void load(device::SharedAddress stage, std::int64_t left) const {
    gather<Shape::kRows>(stage, a, a_row, a_rows, inner - left);
    gather<Shape::kColumns>(stage + Shape::kABytes, b, b_row, b_rows, inner - left);
  }

 private:
  // Neighbouring threads take neighbouring chunks of a row, or neighbouring rows, whichever is contiguous in memory.
  template <int kRows, typename Source>
  __device__ void gather(device::SharedAddress to, const Source& source, std::int64_t row0, std::int64_t rows,
                         std::int64_t k0) const {
    using Tile = device::SmemTile<Op, device::Major::kK, kRows, Shape::kDepthBytes>;
    constexpr int kChunks = Tile::kRowBytes / 16, kElements = 16 / static_cast<int>(sizeof(Op));
#pragma unroll 2  // more would keep the elements of more chunks in registers than there are
    for (int index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
      const int row = source.along_k ? index / kChunks : index % kRows;
      const int chunk = source.along_k ? index % kChunks : index / kRows;
      device::store_shared_128(to + Tile::offset(row, chunk),
                               gather_chunk<Op>(source, row0 + row, k0 + chunk * kElements, rows, inner));
    }
  }
};

// write(row, column, value) for every element of the tile at (row0, column0) that lies within the result.
template <typename Op, typename A, typename B, typename Write>
__device__ void product_tile(ProductTiles& tiles, const A& a, const B& b, std::int64_t row0, std::int64_t column0,
                             std::int64_t rows, std::int64_t columns, std::int64_t inner, Write write) {
  const int rows_here = static_cast<int>(min(rows - row0, std::int64_t{Shape::kRows}));
  const int columns_here = static_cast<int>(min(columns - column0, std::int64_t{Shape::kColumns}));
  device::AccTile<Shape> acc;  // C = A B^T
  device::mainloop(acc, device::WarpGemm<Op, Shape, device::Major::kK, device::Major::kK>(),
                   device::shared_address(tiles.bytes),
                   GatherLoader<Op, A, B>{a, b, row0, column0, rows, columns, inner}, inner,
                   Shape::rows_of_warp(rows_here, columns_here));
  acc.for_each([&](int row, int column, float value) {
    if (row < rows_here && column < columns_here) write(row0 + row, column0 + column, value);
  });
}

// All columns of 32 rows.
template <typename Op, typename A, typename B, typename Write>
__device__ void product_rows(ProductTiles& tiles, const A& a, const B& b, std::int64_t row0, std::int64_t rows,
                             std::int64_t columns, std::int64_t inner, Write write) {
  for (std::int64_t column = 0; column < columns; column += kTileColumns) {
    product_tile<Op>(tiles, a, b, row0, column, rows, columns, inner, write);
  }
}

}  // namespace mfx::router
