// The instances of the CUDA kernels: one row per operand type and head dimension, which smaller ones are padded to. A
// kernel is named stick_<kernel>_<type>_d<dim>_sm80 and runs on everything from sm_80 on; a path for a newer
// architecture adds rows.
#pragma once

#include <limits>

#include "moduleformer_ext/stick_attention.hpp"

// X(name, DType, operand type, head dimension)
#define MFX_STICK_INSTANCES(X)         \
  X(bf16, kBFloat16, BFloat16, 64)     \
  X(bf16, kBFloat16, BFloat16, 128)    \
  X(bf16, kBFloat16, BFloat16, 256)    \
  X(fp16, kFloat16, Float16, 64)       \
  X(fp16, kFloat16, Float16, 128)      \
  X(fp16, kFloat16, Float16, 256)      \
  X(fp32, kFloat32, float, 64)         \
  X(fp32, kFloat32, float, 128)        \
  X(fp32, kFloat32, float, 256)        \
  X(tf32, kFloat32, device::Tf32, 64)  \
  X(tf32, kFloat32, device::Tf32, 128) \
  X(tf32, kFloat32, device::Tf32, 256)

// Head dims that are split over the warps of a block.
#define MFX_STICK_WIDE_INSTANCES(X)  \
  X(bf16, kBFloat16, BFloat16, 1024) \
  X(fp16, kFloat16, Float16, 1024)   \
  X(fp32, kFloat32, float, 1024)     \
  X(tf32, kFloat32, device::Tf32, 1024)

namespace mfx {

// Refusals.
inline constexpr Status kStickTooLarge = {
    "q and k must have fewer than 2^31 rows per head and 2^37 in all for the CUDA kernels, got more", nullptr, true};

inline Status stick_no_instance(const StickAttentionProblem& p) {
  return {p.dtype == DType::kFloat64 ? "q must be float32, bfloat16 or float16 for the CUDA kernels, got float64"
                                     : "q must have a head dim of at most 1024 for the CUDA kernels, got more",
          nullptr, true};
}

// Whether a row of the table serves a problem, if it is large enough.
inline bool stick_serves(DType dtype, bool tf32, int most_head_dim, const StickAttentionProblem& p) {
  return dtype == p.dtype && tf32 == (p.allow_tf32 && p.dtype == DType::kFloat32) && p.head_dim <= most_head_dim;
}

}  // namespace mfx
