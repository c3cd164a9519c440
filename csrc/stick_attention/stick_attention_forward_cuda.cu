// Launcher of stick_attention forward: the instances, and the choice among them.
#include <cuda_runtime.h>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "stick_attention/forward.cuh"
#include "stick_attention/forward_instances.hpp"
#include "stick_attention/forward_wide.cuh"

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

#define MFX_STICK_FORWARD_ROW(name, dtype, op, dim) \
  {"stick_fwd_" #name "_d" #dim "_sm80",            \
   DType::dtype,                                    \
   std::is_same_v<op, device::Tf32>,                \
   dim,                                             \
   Forward<op, dim>::kRows,                         \
   Forward<op, dim>::kThreads,                      \
   Forward<op, dim>::kSharedBytes,                  \
   stick_fwd_##name##_d##dim##_sm80},
static constexpr ForwardInstance kInstances[] = {MFX_STICK_INSTANCES(MFX_STICK_FORWARD_ROW)};

static ForwardInstances hopper_instances() {
#ifdef MFX_SM90
  return forward_instances_sm90a();
#else
  return {nullptr, 0};
#endif
}

static const KernelList kListed("stick_attention_forward", [](const char* op, KernelSink sink, void* context) {
  for (const ForwardInstance& instance : kInstances) sink(context, op, instance.name, 80);
  const ForwardInstances hopper = hopper_instances();
  for (int i = 0; i < hopper.count; ++i) sink(context, op, hopper.first[i].name, 90);
});

// The instance that serves a problem on the current device, or null: one of sm_90a at compute capability 9.0 alone.
static const ForwardInstance* choose_instance(const StickAttentionProblem& p, int capability) {
  const ForwardInstances hopper = hopper_instances();
  const ForwardInstance* const own = capability == 90 ? find_instance(hopper.first, hopper.count, p) : nullptr;
  return own != nullptr ? own : find_instance(kInstances, p);
}

}  // namespace mfx::stick

namespace mfx {

using namespace stick;

extern "C" __attribute__((visibility("default"))) Status
mfx_stick_attention_forward_cuda(const StickAttentionForwardParams& params, Stream stream) {
  const StickAttentionProblem& p = params.problem;
  int capability = 0;
  const Status known = compute_capability(&capability);
  if (!known.ok()) return known;
  const ForwardInstance* const instance = choose_instance(p, capability);
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
  const Status status = mfx::launch(instance->kernel, static_cast<unsigned>(blocks), instance->threads,
                                    instance->shared_bytes, stream, launch);
  const bool aligned = launch.q_aligned && launch.k_aligned && launch.v_aligned && launch.o_aligned;
  return {status.message, aligned ? nullptr : kStickSlow};
}

}  // namespace mfx
