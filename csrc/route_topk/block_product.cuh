// C [rows, columns] = A B^T by one block of 128 threads, in tiles of 32 x 64 and steps of 128 bytes of the inner
// dimension. Operands (router_operands.cuh) are gathered into swizzled shared memory, so that one product serves every
// storage type, transposition and segmentation; other blocks of the processor work while one waits for its operands. Op
// is what the tensor cores multiply: BFloat16, Float16, or float as three tf32 products (tile/tile_product.cuh).
#pragma once

#include <cstdint>

#include "route_topk/router_operands.cuh"
#include "tile/tile_product.cuh"

namespace mfx::router {

inline constexpr int kThreads = 128;           // 2 x 2 warps of 16 x 32
inline constexpr int kBlocksPerProcessor = 5;  // leaves 96 registers per thread
inline constexpr int kTileRows = 32;
inline constexpr int kTileColumns = 64;
inline constexpr int kRowBytes = 128;
inline constexpr int kChunks = kRowBytes / 16;

struct ProductTiles {
  alignas(1024) char a[kTileRows * kRowBytes];
  alignas(1024) char b[kTileColumns * kRowBytes];
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

// One operand's part of a step: kRows rows of 128 bytes, kRows * kChunks / kThreads chunks per thread. Neighbouring
// threads take neighbouring chunks of a row, or neighbouring rows, whichever is contiguous in memory.
template <typename Op, int kRows, typename Source>
__device__ void gather_tile(device::SharedAddress tile, const Source& source, std::int64_t row0, std::int64_t k0,
                            std::int64_t rows, std::int64_t inner) {
#pragma unroll 2  // more would keep the elements of more chunks in registers than there are
  for (int index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
    const int row = source.along_k ? index / kChunks : index % kRows;
    const int chunk = source.along_k ? index % kChunks : index / kRows;
    device::store_shared_128(
        tile + device::swizzled_offset<kRowBytes>(row, chunk),
        gather_chunk<Op>(source, row0 + row, k0 + chunk * (16 / static_cast<int>(sizeof(Op))), rows, inner));
  }
}

// write(row, column, value) for every element of the tile at (row0, column0) that lies within the result.
template <typename Op, typename A, typename B, typename Write>
__device__ void product_tile(ProductTiles& tiles, const A& a, const B& b, std::int64_t row0, std::int64_t column0,
                             std::int64_t rows, std::int64_t columns, std::int64_t inner, Write write) {
  constexpr int kStep = kRowBytes / static_cast<int>(sizeof(Op));
  const device::SharedAddress a_tile = device::shared_address(tiles.a), b_tile = device::shared_address(tiles.b);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % 2 * 16, warp_column = warp / 2 * 32;
  const device::SharedAddress a_lane = device::a_rows<kRowBytes>(a_tile + warp_row * kRowBytes);
  const device::SharedAddress b_lane = device::b_rows<kRowBytes>(b_tile + warp_column * kRowBytes);

  float sums[4][4] = {};
  for (std::int64_t k = 0; k < inner; k += kStep) {
    __syncthreads();  // the step before has been read
    gather_tile<Op, kTileRows>(a_tile, a, row0, k, rows, inner);
    gather_tile<Op, kTileColumns>(b_tile, b, column0, k, columns, inner);
    __syncthreads();
    device::gemm_abt<Op, kRowBytes>(
        sums, [&](auto step, device::FragmentA& fragment) { device::load_a<step>(fragment, a_lane); }, b_lane);
  }
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = row0 + warp_row + lane / 4 + i / 2 * 8;
      const std::int64_t column = column0 + warp_column + tile * 8 + lane % 4 * 2 + i % 2;
      if (row < rows && column < columns) write(row, column, sums[tile][i]);
    }
  }
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
