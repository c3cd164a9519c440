// The instances of stick_attention backward's dQ kernel on sm_90a.
#include "stick_attention/hopper/backward_dq.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {

#define MFX_STICK_BACKWARD_DQ_KERNEL(name, dtype, op, dim)                                     \
  extern "C" __global__ void __launch_bounds__(HopperBackwardDq<op, dim>::kThreads, 1)         \
      stick_bwd_query_##name##_d##dim##_sm90a(const __grid_constant__ BackwardLaunch launch) { \
    HopperBackwardDq<op, dim>::run(launch);                                                    \
  }
MFX_STICK_HOPPER_INSTANCES(MFX_STICK_BACKWARD_DQ_KERNEL)

#define MFX_STICK_BACKWARD_DQ_ROW(name, dtype, op, dim)                                                           \
  tile_instance<HopperBackwardDq<op, dim>>("stick_bwd_query_" #name "_d" #dim "_sm90a", DType::dtype, false, dim, \
                                           stick_bwd_query_##name##_d##dim##_sm90a),

TileInstances<BackwardLaunch> backward_dq_instances_sm90a() {
  static constexpr TileInstance<BackwardLaunch> kTable[] = {MFX_STICK_HOPPER_INSTANCES(MFX_STICK_BACKWARD_DQ_ROW)};
  return {kTable, sizeof(kTable) / sizeof(kTable[0])};
}

}  // namespace mfx::stick
