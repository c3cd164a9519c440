// The instances of stick_attention forward on sm_90a.
#include "stick_attention/forward_instances.hpp"
#include "stick_attention/hopper/forward.cuh"

// X(name, DType, operand type, head dimension)
#define MFX_STICK_HOPPER_DIMS(X, ...) X(__VA_ARGS__, 64) X(__VA_ARGS__, 128)
#define MFX_STICK_HOPPER_INSTANCES(X)                 \
  MFX_STICK_HOPPER_DIMS(X, bf16, kBFloat16, BFloat16) \
  MFX_STICK_HOPPER_DIMS(X, fp16, kFloat16, Float16)

namespace mfx::stick {

#define MFX_STICK_FORWARD_KERNEL(name, dtype, op, dim)                                  \
  extern "C" __global__ void __launch_bounds__(HopperForward<op, dim>::kThreads, 1)     \
      stick_fwd_##name##_d##dim##_sm90a(const __grid_constant__ ForwardLaunch launch) { \
    HopperForward<op, dim>::run(launch);                                                \
  }
MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_KERNEL)

#define MFX_STICK_FORWARD_ROW(name, dtype, op, dim) \
  {"stick_fwd_" #name "_d" #dim "_sm90a",           \
   DType::dtype,                                    \
   false,                                           \
   dim,                                             \
   HopperForward<op, dim>::kRows,                   \
   HopperForward<op, dim>::kThreads,                \
   HopperForward<op, dim>::kSharedBytes,            \
   stick_fwd_##name##_d##dim##_sm90a},

ForwardInstances forward_instances_sm90a() {
  static constexpr ForwardInstance kTable[] = {MFX_STICK_HOPPER_INSTANCES(MFX_STICK_FORWARD_ROW)};
  return {kTable, sizeof(kTable) / sizeof(kTable[0])};
}

}  // namespace mfx::stick
