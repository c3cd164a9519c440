// The warpgroups of a block of sm_90a: one that loads, and two or three that multiply.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "tile/slice_ring.cuh"

namespace mfx::device {

inline constexpr int kMultiplyingWarpgroups = 2, kRolesThreads = (1 + kMultiplyingWarpgroups) * kWarpgroup;
inline constexpr int kLoadingRegisters = 72;  // per thread

// What a block's registers leave to a thread that multiplies; they are handed out in eights.
constexpr int multiplying_registers(int multiplying_warpgroups, int loading_registers) {
  constexpr int kRegisters = 65536 / kWarpgroup;
  return (kRegisters - loading_registers) / multiplying_warpgroups / 8 * 8;
}

// With these registers, calls load() or multiply(warpgroup), once what the block has written to shared memory is there
// for all.
template <int kMultiplying = kMultiplyingWarpgroups, int kLoading = kLoadingRegisters, typename Load, typename Multiply>
__device__ inline void take_roles(Load&& load, Multiply&& multiply) {
  __syncthreads();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kLoading>();
    load();
  } else {
    cutlass::arch::warpgroup_reg_alloc<multiplying_registers(kMultiplying, kLoading)>();
    multiply(warpgroup - 1);
  }
}

}  // namespace mfx::device
