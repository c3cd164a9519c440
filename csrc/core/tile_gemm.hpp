// Products of cache-resident tiles: C[m, n] (+)= A[m, k] B[k, n], all row-major with row strides lda, ldb, ldc.
//
// One name over three operand types: float (ATen's brgemm where it is, else the kernel below), double (the kernel
// below), bf16 with fp32 C (brgemm only, B in VNNI order; see core/brgemm.hpp). Kernels pick their operand type once:
// bf16 storage is multiplied as bf16 where brgemm_available_bf16(), and widened to float while packing elsewhere;
// fp16 storage is always widened, which loses nothing.
#pragma once

#include <algorithm>

#include "core/brgemm.hpp"
#include "core/simd.hpp"

namespace mfx::MFX_ISA {

// Register blocking: rows x vectors of accumulators, leaving room for the row of B and one broadcast.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;

// One register block. A compile-time row count keeps the accumulators in registers.
template <typename T, int kRows, int kVectors>
inline void tile_gemm_block(std::int64_t k, const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T* c,
                            std::int64_t ldc, bool accumulate) {
  constexpr int w = kWidth<T>;
  Vec<T> sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = accumulate ? load(c + i * ldc + j * w) : Vec<T>{};
  }
  for (std::int64_t l = 0; l < k; ++l) {
    Vec<T> row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + l * ldb + j * w);
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * lda + l];
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * w, sum[i][j]);
  }
}

// A column strip narrower than one vector.
template <typename T>
inline void tile_gemm_tail(std::int64_t m, int n, std::int64_t k, const T* a, std::int64_t lda, const T* b,
                           std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate) {
  for (std::int64_t i = 0; i < m; ++i) {
    Vec<T> sum = accumulate ? load_partial(c + i * ldc, n) : Vec<T>{};
    for (std::int64_t l = 0; l < k; ++l) sum += a[i * lda + l] * load_partial(b + l * ldb, n);
    store_partial(c + i * ldc, sum, n);
  }
}

template <typename T, int kVectors>
inline void tile_gemm_strip(std::int64_t m, std::int64_t k, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
                            T* c, std::int64_t ldc, bool accumulate) {
  std::int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    tile_gemm_block<T, kTileRows, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
  for (; i < m; ++i) {
    tile_gemm_block<T, 1, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
}

template <typename T>
inline void tile_gemm_native(std::int64_t m, std::int64_t n, std::int64_t k, const T* a, std::int64_t lda, const T* b,
                             std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate) {
  constexpr int w = kWidth<T>;
  std::int64_t j = 0;
  for (; j + kTileVectors * w <= n; j += kTileVectors * w) {
    tile_gemm_strip<T, kTileVectors>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j + w <= n; j += w) tile_gemm_strip<T, 1>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  if (j < n) tile_gemm_tail(m, static_cast<int>(n - j), k, a, lda, b + j, ldb, c + j, ldc, accumulate);
}

template <typename Op>
inline void tile_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const Op* a, std::int64_t lda, const Op* b,
                      std::int64_t ldb, Accumulate<Op>* c, std::int64_t ldc, bool accumulate) {
  if constexpr (!std::is_same_v<Op, double>) {
    if (std::is_same_v<Op, BFloat16> || brgemm_available_f32())
      return brgemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  }
  if constexpr (!std::is_same_v<Op, BFloat16>) tile_gemm_native(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace mfx::MFX_ISA
