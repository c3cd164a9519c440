// The instances of stick_attention forward on sm_90a.
#include "stick_attention/hopper/forward.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {

#define MFX_STICK_FORWARD_KERNEL(name, dtype, op, dim)                                  \
  extern "C" __global__ void __launch_bounds__(HopperForward<op, dim>::kThreads, 1)     \
      stick_fwd_##name##_d##dim##_sm90a(const __grid_constant__ ForwardLaunch launch) { \
    HopperForward<op, dim>::run(launch);                                                \
  }
MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_KERNEL)

#define MFX_STICK_FORWARD_ROW(name, dtype, op, dim)                                                      \
  tile_instance<HopperForward<op, dim>>("stick_fwd_" #name "_d" #dim "_sm90a", DType::dtype, false, dim, \
                                        stick_fwd_##name##_d##dim##_sm90a),

TileInstances<ForwardLaunch> forward_instances_sm90a() {
  static constexpr TileInstance<ForwardLaunch> kTable[] = {MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_ROW)};
  return {kTable, sizeof(kTable) / sizeof(kTable[0])};
}

}  // namespace mfx::stick
