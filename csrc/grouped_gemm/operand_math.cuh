// The arithmetic of a product: storage type and the tensor-core instructions that multiply it.
//
// A left operand is 16 rows by 32 bytes of depth, a right one two groups of 8 columns by 32 bytes, 4 registers each.
// kStepsOverlap: registers last for the loads of one step of 32 bytes beside the products of another; else branches
// between blocks of 16 rows keep even those from being interleaved.
#pragma once

#include "tile/tf32.cuh"

namespace mfx::grouped {

struct Registers {
  std::uint32_t r[4];
};

struct Bf16Math {
  using T = BFloat16;
  static constexpr bool kStepsOverlap = true;
  using Operand = Registers;
  static __device__ Operand operand(const std::uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  static __device__ void multiply(float (&c)[4], const Operand& a, const Operand& b, int group) {
    device::mma_m16n8k16_bf16(c, a.r, b.r[2 * group], b.r[2 * group + 1], c);
  }
};

struct F16Math {
  using T = Float16;
  static constexpr bool kStepsOverlap = true;
  using Operand = Registers;
  static __device__ Operand operand(const std::uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  static __device__ void multiply(float (&c)[4], const Operand& a, const Operand& b, int group) {
    device::mma_m16n8k16_f16(c, a.r, b.r[2 * group], b.r[2 * group + 1], c);
  }
};

// float32 rounded to TF32's 11 significant bits.
struct Tf32Math {
  using T = float;
  static constexpr bool kStepsOverlap = true;
  using Operand = Registers;
  static __device__ Operand operand(const std::uint32_t (&r)[4]) {
    Operand x;
    for (int i = 0; i < 4; ++i) x.r[i] = device::to_tf32(__uint_as_float(r[i]));
    return x;
  }
  static __device__ void multiply(float (&c)[4], const Operand& a, const Operand& b, int group) {
    device::mma_m16n8k8_tf32(c, a.r, b.r[2 * group], b.r[2 * group + 1], c);
  }
};

// float32 as three TF32 products.
struct F32Math {
  using T = float;
  static constexpr bool kStepsOverlap = false;
  using Operand = device::SplitTf32<4>;
  static __device__ Operand operand(const std::uint32_t (&r)[4]) { return device::split_tf32(r); }
  static __device__ void multiply(float (&c)[4], const Operand& a, const Operand& b, int group) {
    device::mma_m16n8k8_3xtf32(c, a, b, 2 * group);
  }
};

}  // namespace mfx::grouped
