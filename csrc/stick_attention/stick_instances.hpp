// The instances of the CUDA kernels: one row per operand type and head dimension, which smaller ones are padded to. A
// kernel is named stick_<kernel>_<type>_d<dim>_sm80 and runs on everything from sm_80 on; some have rows for
// sm_90a beside them (tile_instances.hpp).
#pragma once

#include <limits>

#include "moduleformer_ext/stick_attention.hpp"

// X(name, DType, operand type, head dimension). That of 1024 is split over the warps of a block.
#define MFX_STICK_DIMS(X, ...) X(__VA_ARGS__, 64) X(__VA_ARGS__, 128) X(__VA_ARGS__, 256) X(__VA_ARGS__, 1024)
#define MFX_STICK_INSTANCES(X)                 \
  MFX_STICK_DIMS(X, bf16, kBFloat16, BFloat16) \
  MFX_STICK_DIMS(X, fp16, kFloat16, Float16)   \
  MFX_STICK_DIMS(X, fp32, kFloat32, float)     \
  MFX_STICK_DIMS(X, tf32, kFloat32, device::Tf32)

// The same of sm_90a's.
#define MFX_STICK_HOPPER_DIMS(X, ...) X(__VA_ARGS__, 64) X(__VA_ARGS__, 128)
#define MFX_STICK_HOPPER_INSTANCES(X)                 \
  MFX_STICK_HOPPER_DIMS(X, bf16, kBFloat16, BFloat16) \
  MFX_STICK_HOPPER_DIMS(X, fp16, kFloat16, Float16)

namespace mfx {

// Wider heads than this are split, over the warps or warpgroups.
inline constexpr int kStickTiledHeadDim = 256;

// Refusals.
inline constexpr Status kStickTooLarge = {
    "q and k must have fewer than 2^31 rows per head and 2^37 in all for the CUDA kernels, got more", nullptr, true};

inline Status stick_no_instance(const StickAttentionProblem& p) {
  return {p.dtype == DType::kFloat64 ? "q must be float32, bfloat16 or float16 for the CUDA kernels, got float64"
                                     : "q must have a head dim of at most 1024 for the CUDA kernels, got more",
          nullptr, true};
}

// The first of `count` rows of a table that serves a problem, or null.
template <typename Instance>
const Instance* find_instance(const Instance* table, int count, const StickAttentionProblem& p) {
  const bool tf32 = p.allow_tf32 && p.dtype == DType::kFloat32;
  for (const Instance* row = table; row != table + count; ++row) {
    if (row->dtype == p.dtype && row->tf32 == tf32 && p.head_dim <= row->most_head_dim) return row;
  }
  return nullptr;
}
template <typename Instance, std::size_t kSize>
const Instance* find_instance(const Instance (&table)[kSize], const StickAttentionProblem& p) {
  return find_instance(table, static_cast<int>(kSize), p);
}

}  // namespace mfx
