// The warpgroups of a block of sm_90a: one that loads, and two that multiply.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "tile/slice_ring.cuh"

namespace mfx::device {

inline constexpr int kMultiplyingWarpgroups = 2, kRolesThreads = (1 + kMultiplyingWarpgroups) * kWarpgroup;
// Per thread: 64512 in all.
inline constexpr int kLoadingRegisters = 72, kMultiplyingRegisters = 216;

// With the registers given, calls load() or multiply(warpgroup), once what the block has written to shared memory is
// there for all.
template <int kLoading = kLoadingRegisters, int kMultiplying = kMultiplyingRegisters, typename Load, typename Multiply>
__device__ inline void take_roles(Load&& load, Multiply&& multiply) {
  __syncthreads();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kLoading>();
    load();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kMultiplying>();
    multiply(warpgroup - 1);
  }
}

}  // namespace mfx::device
