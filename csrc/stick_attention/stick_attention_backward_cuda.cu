// Launcher of stick_attention backward: the instances, the choice among them, and the workspace.
#include <cuda_runtime.h>

#include <algorithm>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "core/workspace.hpp"
#include "stick_attention/backward_dkv.cuh"
#include "stick_attention/backward_dkv_wide.cuh"
#include "stick_attention/backward_dq.cuh"
#include "stick_attention/backward_dq_wide.cuh"
#include "stick_attention/forward.cuh"
#include "stick_attention/forward_wide.cuh"
#include "stick_attention/tile_instances.hpp"

namespace mfx::stick {
namespace {

struct Kernel {
  const char* name;
  void (*function)(BackwardLaunch);
  int threads, shared_bytes;
};

struct Instance {
  DType dtype;
  bool tf32;
  int most_head_dim;
  int forward_keys, query_rows, keys, keys_per_run;
  Kernel v_norms, query, key;
};

// How the kernels of an instance work: head dims above 256 are split over the warps.
template <typename Op, int kDim>
struct Backward {
  using Query = BackwardDqShape<Op, kDim>;
  using Key = BackwardDkvShape<Op, kDim>;
  static constexpr int kForwardKeys = ForwardShape<Op, kDim>::kKeys, kKeysPerRun = Query::kKeys / kRunsOfSpan;
  __device__ static void run_query(const BackwardLaunch& launch) { backward_dq<Op, kDim>(launch); }
  __device__ static void run_key(const BackwardLaunch& launch) { backward_dkv<Op, kDim>(launch); }
};
template <typename Op>
struct Backward<Op, 1024> {
  using Query = WideBackwardDqShape<Op>;
  using Key = WideBackwardDkvShape<Op>;
  static constexpr int kForwardKeys = WideForwardShape<Op>::kKeys, kKeysPerRun = Query::kKeys;
  __device__ static void run_query(const BackwardLaunch& launch) { backward_dq_wide<Op>(launch); }
  __device__ static void run_key(const BackwardLaunch& launch) { backward_dkv_wide<Op>(launch); }
};

}  // namespace

extern "C" __global__ void stick_bwd_lengths_bf16(const __grid_constant__ BackwardLaunch launch) {
  value_norms<BFloat16>(launch);
}
extern "C" __global__ void stick_bwd_lengths_fp16(const __grid_constant__ BackwardLaunch launch) {
  value_norms<Float16>(launch);
}
extern "C" __global__ void stick_bwd_lengths_fp32(const __grid_constant__ BackwardLaunch launch) {
  value_norms<float>(launch);
}

#define MFX_STICK_BACKWARD_KERNELS(name, dtype, op, dim)                                      \
  extern "C" __global__ void __launch_bounds__(Backward<op, dim>::Query::kThreads, 1)         \
      stick_bwd_query_##name##_d##dim##_sm80(const __grid_constant__ BackwardLaunch launch) { \
    Backward<op, dim>::run_query(launch);                                                     \
  }                                                                                           \
  extern "C" __global__ void __launch_bounds__(Backward<op, dim>::Key::kThreads, 1)           \
      stick_bwd_key_##name##_d##dim##_sm80(const __grid_constant__ BackwardLaunch launch) {   \
    Backward<op, dim>::run_key(launch);                                                       \
  }
MFX_STICK_INSTANCES(MFX_STICK_BACKWARD_KERNELS)

namespace {

template <typename Op, int kDim>
constexpr Instance instance(DType dtype, const char* query_name, void (*query)(BackwardLaunch), const char* key_name,
                            void (*key)(BackwardLaunch)) {
  using B = Backward<Op, kDim>;
  constexpr auto v_norms = std::is_same_v<Op, BFloat16>  ? stick_bwd_lengths_bf16
                           : std::is_same_v<Op, Float16> ? stick_bwd_lengths_fp16
                                                         : stick_bwd_lengths_fp32;
  return {dtype,
          std::is_same_v<Op, device::Tf32>,
          kDim,
          B::kForwardKeys,
          B::Query::kRows,
          B::Key::kKeys,
          B::kKeysPerRun,
          {nullptr, v_norms, 128, 0},
          {query_name, query, B::Query::kThreads, B::Query::kSharedBytes},
          {key_name, key, B::Key::kThreads, B::Key::kSharedBytes}};
}

#define MFX_STICK_BACKWARD_ROW(name, dtype, op, dim)                                                                  \
  instance<op, dim>(DType::dtype, "stick_bwd_query_" #name "_d" #dim "_sm80", stick_bwd_query_##name##_d##dim##_sm80, \
                    "stick_bwd_key_" #name "_d" #dim "_sm80", stick_bwd_key_##name##_d##dim##_sm80),
constexpr Instance kInstances[] = {MFX_STICK_INSTANCES(MFX_STICK_BACKWARD_ROW)};

// Kernels that take the place of an instance's, on sm_90a.
TileInstances<BackwardLaunch> hopper_dq_instances() {
  return MFX_SM90_INSTANCES(backward_dq_instances_sm90a);
}
TileInstances<BackwardLaunch> hopper_dkv_instances() {
  return MFX_SM90_INSTANCES(backward_dkv_instances_sm90a);
}

const KernelList kListed("stick_attention_backward", [](const char* op, KernelSink sink, void* context) {
  for (const Instance& row : kInstances) {
    for (const Kernel& kernel : {row.query, row.key}) sink(context, op, kernel.name, 80);
  }
  list_sm90a(hopper_dq_instances(), op, sink, context);
  list_sm90a(hopper_dkv_instances(), op, sink, context);
});
MFX_LIST_KERNELS(kListedLengths, "stick_attention_backward", 80, "stick_bwd_lengths_bf16", "stick_bwd_lengths_fp16",
                 "stick_bwd_lengths_fp32");

// The parts of the workspace; see BackwardLaunch.
struct Memory {
  std::int64_t rows, norm_slots, bytes;
  RunState* run_states;
  float2* states;
  float *sums, *v_norms;

  Memory(const Instance& instance, const StickAttentionProblem& p, void* memory)
      : rows(p.tokens_q * p.group * (p.cu_seqlens_q == nullptr ? p.sequences : 1)),
        norm_slots(stick_tile_slots(p, p.tokens_k, kNormKeys)) {
    const std::int64_t keys = round_up(std::min<std::int64_t>(p.tokens_k, kKvChunk), 64);
    const std::int64_t all_rows = p.heads * rows, chunk_rows = p.tokens_k > kKvChunk ? all_rows : 0;
    Workspace workspace(memory);
    run_states = workspace.take<RunState>(keys / instance.keys_per_run * all_rows);
    states = workspace.take<float2>(chunk_rows);
    sums = workspace.take<float>(chunk_rows * p.head_dim);
    v_norms = workspace.take<float>(p.heads * norm_slots);
    bytes = workspace.bytes();
  }
};

Status launch_blocks(const Kernel& kernel, std::int64_t blocks, const BackwardLaunch& params, Stream stream) {
  if (blocks == 0) return {};
  return launch(kernel.function, static_cast<unsigned>(blocks), kernel.threads, kernel.shared_bytes, stream, params);
}

}  // namespace

}  // namespace mfx::stick

namespace mfx {

using namespace stick;

extern "C" __attribute__((visibility("default"))) std::int64_t mfx_stick_attention_backward_cuda_workspace(
    const StickAttentionBackwardParams& params) {
  const Instance* const instance = find_instance(kInstances, params.problem);
  return instance == nullptr ? 0 : Memory(*instance, params.problem, nullptr).bytes;
}

extern "C" __attribute__((visibility("default"))) Status
mfx_stick_attention_backward_cuda(const StickAttentionBackwardParams& params, Stream stream) {
  const StickAttentionProblem& p = params.problem;
  const Instance* const instance = find_instance(kInstances, p);
  if (instance == nullptr) return stick_no_instance(p);
  if (p.head_dim > 256 && p.dtype == DType::kFloat32 && params.grad_v != nullptr) {
    return {"v must be k to have a float32 gradient for head dims above 256 in the CUDA kernels, got another", nullptr,
            true};
  }
  int capability = 0;
  const Status known = compute_capability(&capability);
  if (!known.ok()) return known;
  Kernel query = instance->query, key = instance->key;
  int query_rows = instance->query_rows, block_keys = instance->keys;
  const auto take = [&](TileInstances<BackwardLaunch> hopper, Kernel& kernel, int& tile_rows) {
    const auto* const own = find_sm90a(hopper, p, capability);
    if (own == nullptr) return;
    kernel = {own->name, own->kernel, own->threads, own->shared_bytes};
    tile_rows = own->tile_rows;
  };
  take(hopper_dq_instances(), query, query_rows);
  take(hopper_dkv_instances(), key, block_keys);
  const Memory memory(*instance, p, params.workspace);
  const std::int64_t query_blocks = stick_tile_slots(p, p.tokens_q * p.group, query_rows) * p.heads;
  const std::int64_t key_blocks = p.sequences * p.heads * (kKvChunk / block_keys);
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (!stick_fits(p) || query_blocks > kMost || key_blocks > kMost) return kStickTooLarge;
  const std::int64_t element = element_size(p.dtype);
  BackwardLaunch launch = {
      .params = params,
      .factor = static_cast<float>(p.scale * 1.4426950408889634),
      .scale = static_cast<float>(p.scale),
      .forward_keys = instance->forward_keys,
      .chunk_begin = 0,
      .chunk_end = 0,
      .newest_chunk = true,
      .rows = memory.rows,
      .norm_slots = memory.norm_slots,
      .run_states = memory.run_states,
      .states = memory.states,
      .sums = memory.sums,
      .v_norms = memory.v_norms,
      .q_aligned = stick_aligned(p.q, element, p.q_strides),
      .k_aligned = stick_aligned(p.k, element, p.k_strides),
      .v_aligned = stick_aligned(p.v, element, p.v_strides),
      .grad_o_aligned = stick_aligned(params.grad_o, element, params.grad_o_strides),
      .o_aligned = stick_aligned(params.o, element, params.o_strides) &&
                   stick_aligned(params.residual, element, params.o_strides),
      .grad_q_aligned = stick_aligned(params.grad_q, element, params.grad_q_strides),
      .grad_k_aligned = stick_aligned(params.grad_k, element, params.grad_k_strides),
      .grad_v_aligned = stick_aligned(params.grad_v, element, params.grad_v_strides),
  };
  Status status = launch_blocks(instance->v_norms, ceil_div(p.heads * memory.norm_slots, 4), launch, stream);
  for (std::int64_t kv_chunk = ceil_div(p.tokens_k, kKvChunk); kv_chunk-- > 0 && status.ok();) {
    launch.chunk_begin = static_cast<int>(kv_chunk * kKvChunk);
    launch.chunk_end = launch.chunk_begin + kKvChunk;
    status = launch_blocks(query, query_blocks, launch, stream);
    launch.newest_chunk = false;
    if (!status.ok()) break;
    const std::int64_t keys = std::min<std::int64_t>(kKvChunk, p.tokens_k - launch.chunk_begin);
    const std::int64_t tiles = ceil_div(keys, block_keys);
    status = launch_blocks(key, tiles * p.sequences * p.heads, launch, stream);
  }
  const bool aligned = launch.q_aligned && launch.k_aligned && launch.v_aligned && launch.grad_o_aligned &&
                       launch.o_aligned && launch.grad_q_aligned && launch.grad_k_aligned && launch.grad_v_aligned;
  return {status.message, aligned ? nullptr : kStickSlow};
}

}  // namespace mfx
