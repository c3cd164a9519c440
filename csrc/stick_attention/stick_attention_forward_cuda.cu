// Launcher of stick_attention forward: the instances, and the choice among them.
#include <cuda_runtime.h>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "stick_attention/forward.cuh"
#include "stick_attention/forward_wide.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {
namespace {

// How an instance works: head dims above 256 are split over the warps.
template <typename Op, int kDim>
struct Forward : ForwardShape<Op, kDim> {
  static constexpr int kRows = kStickTileRows;
  __device__ static void run(const ForwardLaunch& launch) { forward<Op, kDim>(launch); }
};
template <typename Op>
struct Forward<Op, 1024> : WideForwardShape<Op> {
  __device__ static void run(const ForwardLaunch& launch) { forward_wide<Op>(launch); }
};

}  // namespace

#define MFX_STICK_FORWARD_KERNEL(name, dtype, op, dim)                                 \
  extern "C" __global__ void __launch_bounds__(Forward<op, dim>::kThreads, 1)          \
      stick_fwd_##name##_d##dim##_sm80(const __grid_constant__ ForwardLaunch launch) { \
    Forward<op, dim>::run(launch);                                                     \
  }
MFX_STICK_INSTANCES(MFX_STICK_FORWARD_KERNEL)

#define MFX_STICK_FORWARD_ROW(name, dtype, op, dim)                                   \
  tile_instance<Forward<op, dim>>("stick_fwd_" #name "_d" #dim "_sm80", DType::dtype, \
                                  std::is_same_v<op, device::Tf32>, dim, stick_fwd_##name##_d##dim##_sm80),
static constexpr TileInstance<ForwardLaunch> kInstances[] = {MFX_STICK_INSTANCES(MFX_STICK_FORWARD_ROW)};

static TileInstances<ForwardLaunch> hopper_instances() {
  return MFX_SM90_INSTANCES(forward_instances_sm90a);
}

static const KernelList kListed("stick_attention_forward", [](const char* op, KernelSink sink, void* context) {
  for (const auto& instance : kInstances) sink(context, op, instance.name, 80);
  list_sm90a(hopper_instances(), op, sink, context);
});

}  // namespace mfx::stick

namespace mfx {

using namespace stick;

extern "C" __attribute__((visibility("default"))) Status
mfx_stick_attention_forward_cuda(const StickAttentionForwardParams& params, Stream stream) {
  const StickAttentionProblem& p = params.problem;
  int capability = 0;
  const Status known = compute_capability(&capability);
  if (!known.ok()) return known;
  const TileInstance<ForwardLaunch>* instance = find_sm90a(hopper_instances(), p, capability);
  if (instance == nullptr) instance = find_instance(kInstances, p);
  if (instance == nullptr) return stick_no_instance(p);
  const std::int64_t blocks = stick_tile_slots(p, p.tokens_q * p.group, instance->tile_rows) * p.heads;
  if (!stick_fits(p) || blocks > std::numeric_limits<std::int32_t>::max()) return kStickTooLarge;
  if (blocks == 0) return {};
  const std::int64_t element = element_size(p.dtype);
  const ForwardLaunch launch = {
      .params = params,
      .factor = static_cast<float>(p.scale * 1.4426950408889634),
      .epsilon = static_cast<float>(exit_epsilon(params.stick_epsilon)),
      .q_aligned = stick_aligned(p.q, element, p.q_strides),
      .k_aligned = stick_aligned(p.k, element, p.k_strides),
      .v_aligned = stick_aligned(p.v, element, p.v_strides),
      .o_aligned = stick_aligned(params.o, element, params.o_strides),
      .residual_aligned = stick_aligned(params.residual, element, params.o_strides),
  };
  const Status status = mfx::launch(instance->kernel, dim3(static_cast<unsigned>(blocks), instance->cluster),
                                    instance->threads, instance->shared_bytes, stream, launch);
  const bool aligned = launch.q_aligned && launch.k_aligned && launch.v_aligned && launch.o_aligned;
  return {status.message, aligned ? nullptr : kStickSlow};
}

}  // namespace mfx
