// 8x8 matrices of 16-bit elements (8x4 of 32-bit ones, untransposed only) from shared memory into mma fragments.
// PTX ISA, "Warp-level matrix load instruction: ldmatrix". Lanes 8i..8i+7 give the addresses of the rows (16 bytes
// each) of matrix i, kOffset bytes after `address`; lane l receives elements 2(l % 4).. of row l / 4, of column l / 4
// when transposed. volatile and "memory": these read what other threads wrote.
#pragma once

#include "ptx/shared_address.cuh"

namespace mfx::device {

template <int kOffset = 0>
__device__ inline void ldmatrix_x4(std::uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}

}  // namespace mfx::device
