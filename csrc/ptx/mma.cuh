// Warp matrix products D = A B + C with binary32 accumulators. PTX ISA, "Matrix multiply-accumulate operation using
// mma".
//
// Fragments, with g = lane / 4 and c = lane % 4 (columns of 16-bit operands in pairs, one pair per register):
//   C, D [16, 8]   {(g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1)}
//   A [16, 16]     {(g, 2c..), (g+8, 2c..), (g, 2c+8..), (g+8, 2c+8..)}      B [16, 8]  {(2c.., g), (2c+8.., g)}
//   A [16, 8] tf32 {(g, c), (g+8, c), (g, c+4), (g+8, c+4)}                  B [8, 8]   {(c, g), (c+4, g)}
#pragma once

#include <cstdint>

namespace mfx::device {

#define MFX_MMA(name, instruction)                                                                                   \
  __device__ inline void name(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,        \
                              const float (&c)[4]) {                                                                 \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
MFX_MMA(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MFX_MMA(mma_m16n8k16_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
// Operands are binary32 registers of which the tensor core reads the upper 19 bits: round them with to_tf32() first.
MFX_MMA(mma_m16n8k8_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MFX_MMA

}  // namespace mfx::device
