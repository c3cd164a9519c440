// Launchers of stick_attention_decode: which instance serves which head dimension, row count and dtype.
#include <string>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "stick_attention/decode.cuh"
#include "stick_attention/stick_launch.hpp"

namespace mfx::stick_decode {

template <typename T, int kLanes, int kRows, bool kKIsV>
__global__ void __launch_bounds__(Shape<T, kLanes, kRows>::kThreads)
    stick_decode(StickAttentionDecodeParams p, StickDecodePlan plan, StickDecodeWorkspace work, bool aligned,
                 int first_slot) {
  decode<T, Shape<T, kLanes, kRows>, kKIsV>(p, plan, work, aligned, first_slot + static_cast<int>(blockIdx.y));
}

namespace {

// Whether every row of q and of the cache starts at a multiple of 16 bytes.
bool is_aligned(const StickAttentionDecodeParams& p) {
  const std::int64_t element = element_size(p.dtype);
  return stick_aligned(p.q, element, p.q_strides) && stick_aligned(p.k_cache, element, p.k_strides) &&
         stick_aligned(p.v_cache, element, p.v_strides);
}

template <typename T, int kLanes, int kRows, bool kKIsV>
Status launch_plan(const StickAttentionDecodeParams& p, const StickDecodePlan& plan, Stream stream) {
  constexpr int kThreads = Shape<T, kLanes, kRows>::kThreads;
  const auto kernel = stick_decode<T, kLanes, kRows, kKIsV>;
  Workspace workspace(p.workspace);
  const StickDecodeWorkspace work(workspace, plan, p.head_dim);
  const auto groups = static_cast<unsigned>(plan.groups);
  const bool aligned = is_aligned(p);
  Status status = launch(kernel, groups, kThreads, 0, stream, p, plan, work, aligned, 0);
  if (status.ok() && plan.older_slots > 0) {
    const dim3 grid(groups, static_cast<unsigned>(plan.older_slots));  // the newest slots of all groups come first
    status = launch(kernel, grid, kThreads, 0, stream, p, plan, work, aligned, 1);
  }
  return {status.message, aligned ? nullptr : kStickSlow};
}

// f(the first of the constants that is at least n, or the last).
template <int kFirst, int... kRest, typename F>
Status with_at_least(std::int64_t n, F f) {
  if constexpr (sizeof...(kRest) > 0) {
    if (n > kFirst) return with_at_least<kRest...>(n, f);
  }
  return f(std::integral_constant<int, kFirst>());
}

template <typename T>
Status launch_type(const StickAttentionDecodeParams& p, const StickDecodePlan& plan, Stream stream) {
  const std::int64_t chunks = p.head_dim * static_cast<std::int64_t>(sizeof(T)) / 16;
  return with_at_least<8, 16, 32>(chunks, [&](auto lanes) {
    return with_at_least<2, 4, 8>(plan.rows, [&](auto rows) {
      return p.k_is_v ? launch_plan<T, lanes, rows, true>(p, plan, stream)
                      : launch_plan<T, lanes, rows, false>(p, plan, stream);
    });
  });
}

// In the order of the dispatch above: types, lanes per row, rows per block, and whether K is V.
const KernelList kListed("stick_attention_decode", [](const char* op, KernelSink sink, void* context) {
  for (const char* type : {"bf16", "fp16", "fp32"}) {
    for (const char* lanes : {"8", "16", "32"}) {
      for (const char* rows : {"2", "4", "8"}) {
        for (const char* shared : {"", "_shared"}) {
          const std::string name = std::string("stick_decode_") + type + "_lanes" + lanes + "_rows" + rows + shared;
          sink(context, op, name.c_str(), 80);
        }
      }
    }
  }
});

}  // namespace
}  // namespace mfx::stick_decode

namespace mfx {

std::int64_t mfx_stick_attention_decode_cuda_workspace(const StickAttentionDecodeParams& p) {
  const auto plan = StickDecodePlan::of(p);
  Workspace workspace(nullptr);
  if (plan.older_slots > 0) StickDecodeWorkspace(workspace, plan, p.head_dim);
  return workspace.bytes();
}

Status mfx_stick_attention_decode_cuda(const StickAttentionDecodeParams& params, Stream stream) {
  StickAttentionDecodeParams p = params;
  p.stick_epsilon = exit_epsilon(params.stick_epsilon);  // what kernels compare with
  const auto plan = StickDecodePlan::of(p);
  if (plan.groups == 0) return {};
  if (plan.groups > INT32_MAX) return {"stick_attention_decode: q must have fewer than 2^31 heads in all, got more"};
  switch (p.dtype) {
    case DType::kBFloat16: return stick_decode::launch_type<BFloat16>(p, plan, stream);
    case DType::kFloat16: return stick_decode::launch_type<Float16>(p, plan, stream);
    case DType::kFloat32: return stick_decode::launch_type<float>(p, plan, stream);
    case DType::kFloat64: break;
  }
  return {"stick_attention_decode: q must be float32, bfloat16 or float16 on CUDA, got float64"};
}

}  // namespace mfx
