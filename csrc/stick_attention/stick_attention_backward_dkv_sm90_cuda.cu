// The instances of stick_attention backward's dK/dV kernel on sm_90a.
#include "stick_attention/hopper/backward_dkv.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {

#define MFX_STICK_BACKWARD_DKV_KERNEL(name, dtype, op, dim)                                  \
  extern "C" __global__ void __launch_bounds__(HopperBackwardDkv<op, dim>::kThreads, 1)      \
      stick_bwd_key_##name##_d##dim##_sm90a(const __grid_constant__ BackwardLaunch launch) { \
    HopperBackwardDkv<op, dim>::run(launch);                                                 \
  }
MFX_STICK_HOPPER_INSTANCES(MFX_STICK_BACKWARD_DKV_KERNEL)

#define MFX_STICK_BACKWARD_DKV_ROW(name, dtype, op, dim)                                                         \
  tile_instance<HopperBackwardDkv<op, dim>>("stick_bwd_key_" #name "_d" #dim "_sm90a", DType::dtype, false, dim, \
                                            stick_bwd_key_##name##_d##dim##_sm90a),

TileInstances<BackwardLaunch> backward_dkv_instances_sm90a() {
  static constexpr TileInstance<BackwardLaunch> kTable[] = {MFX_STICK_HOPPER_INSTANCES(MFX_STICK_BACKWARD_DKV_ROW)};
  return {kTable, sizeof(kTable) / sizeof(kTable[0])};
}

}  // namespace mfx::stick
