#include "moduleformer_ext/expert_layout.hpp"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "bindings/checks.hpp"
#include "bindings/launch.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "expert_layout";
constexpr int64_t kMostExperts = 1 << 24;  // far beyond use; more would only run out of memory, unclearly
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check_arguments(const at::Tensor& expert_ids, int64_t num_experts) {
  check_dim(kOp, "expert_ids", expert_ids, 2);
  MFX_CHECK_ARG(expert_ids.scalar_type() == at::kInt || expert_ids.scalar_type() == at::kLong, kOp, "expert_ids",
                "be int32 or int64", expert_ids.scalar_type());
  MFX_CHECK_ARG(num_experts >= 1 && num_experts <= kMostExperts, kOp, "num_experts",
                c10::str("be in [1, ", kMostExperts, "]"), num_experts);
}

Outputs allocate(const at::Tensor& expert_ids, int64_t num_experts) {
  const auto options = expert_ids.options().dtype(at::kInt);
  const auto slots = expert_ids.sym_numel();
  return {at::empty({num_experts}, options), at::empty({num_experts + 1}, options), at::empty_symint({slots}, options),
          at::empty_symint({slots}, options)};
}

Outputs expert_layout_meta(const at::Tensor& expert_ids, int64_t num_experts) {
  check_arguments(expert_ids, num_experts);
  return allocate(expert_ids, num_experts);
}

Outputs expert_layout(const at::Tensor& expert_ids, int64_t num_experts) {
  check_arguments(expert_ids, num_experts);
  MFX_CHECK_ARG(expert_ids.numel() <= std::numeric_limits<int32_t>::max(), kOp, "expert_ids",
                "have at most 2^31 - 1 slots", expert_ids.numel());
  const at::Tensor ids = expert_ids.contiguous();
  Outputs outputs = allocate(ids, num_experts);
  auto& [counts, offsets, slot_order, position] = outputs;
  const ExpertLayoutParams params = {
      .expert_ids = ids.const_data_ptr(),
      .ids_are_int64 = ids.scalar_type() == at::kLong,
      .num_slots = ids.numel(),
      .num_experts = num_experts,
      .counts = counts.mutable_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int32_t>(),
      .slot_order = slot_order.mutable_data_ptr<int32_t>(),
      .position = position.mutable_data_ptr<int32_t>(),
  };
  switch (backend_of(kOp, "expert_ids", ids)) {
    case Backend::kCpu: check_status(kOp, expert_layout_cpu(params)); break;
    case Backend::kCuda:
      launch_cuda(kOp, {ids}, params, MFX_CUDA_FUNCTION(mfx_expert_layout_cuda),
                  MFX_CUDA_FUNCTION(mfx_expert_layout_cuda_workspace));
      break;
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  m.def(
      "expert_layout(Tensor expert_ids, int num_experts) -> (Tensor counts, Tensor offsets, Tensor slot_order, Tensor "
      "position)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CPU, m) {
  m.impl("expert_layout", &expert_layout);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, CUDA, m) {
  m.impl("expert_layout", &expert_layout);
}
TORCH_LIBRARY_IMPL(moduleformer_ext, Meta, m) {
  m.impl("expert_layout", &expert_layout_meta);
}
// Integers in, integers out: nothing to differentiate, autograd falls through.

}  // namespace mfx
