// The instances of stick_attention forward on sm_90a.
#include "stick_attention/hopper/forward.cuh"
#include "stick_attention/hopper/forward_wide.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {

#define MFX_STICK_FORWARD_KERNEL(name, dtype, op, dim)                                  \
  extern "C" __global__ void __launch_bounds__(HopperForward<op, dim>::kThreads, 1)     \
      stick_fwd_##name##_d##dim##_sm90a(const __grid_constant__ ForwardLaunch launch) { \
    HopperForward<op, dim>::run(launch);                                                \
  }
MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_KERNEL)

#define MFX_STICK_WIDE_FORWARD_KERNEL(name, op)                                                              \
  extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(HopperForwardWide<op>::kThreads, 1) \
      stick_fwd_##name##_d1024_sm90a(const __grid_constant__ ForwardLaunch launch) {                         \
    HopperForwardWide<op>::run(launch);                                                                      \
  }
MFX_STICK_WIDE_FORWARD_KERNEL(bf16, BFloat16)
MFX_STICK_WIDE_FORWARD_KERNEL(fp16, Float16)

#define MFX_STICK_FORWARD_ROW(name, dtype, op, dim)                                                      \
  tile_instance<HopperForward<op, dim>>("stick_fwd_" #name "_d" #dim "_sm90a", DType::dtype, false, dim, \
                                        stick_fwd_##name##_d##dim##_sm90a),

#define MFX_STICK_WIDE_FORWARD_ROW(name, dtype, op)                \
  TileInstance<ForwardLaunch>{"stick_fwd_" #name "_d1024_sm90a",   \
                              DType::dtype,                        \
                              false,                               \
                              1024,                                \
                              HopperForwardWide<op>::kRows,        \
                              HopperForwardWide<op>::kThreads,     \
                              HopperForwardWide<op>::kSharedBytes, \
                              stick_fwd_##name##_d1024_sm90a,      \
                              kClusterBlocks},

TileInstances<ForwardLaunch> forward_instances_sm90a() {
  static constexpr TileInstance<ForwardLaunch> kTable[] = {MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_ROW)
                                                               MFX_STICK_WIDE_FORWARD_ROW(bf16, kBFloat16, BFloat16)
                                                                   MFX_STICK_WIDE_FORWARD_ROW(fp16, kFloat16, Float16)};
  return {kTable, sizeof(kTable) / sizeof(kTable[0])};
}

}  // namespace mfx::stick
