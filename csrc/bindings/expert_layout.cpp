#include "moduleformer_ext/expert_layout.hpp"

#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>

#include "bindings/checks.hpp"
#include "bindings/launch.hpp"
#include "bindings/op.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "expert_layout";
constexpr int64_t kMostExperts = 1 << 24;  // far beyond use; more would only run out of memory, unclearly
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Args {
  at::Tensor expert_ids;
  int64_t num_experts;
};

void check_arguments(const Args& a) {
  const auto& [expert_ids, num_experts] = a;
  check_dim(kOp, "expert_ids", expert_ids, 2);
  MFX_CHECK_ARG(expert_ids.scalar_type() == at::kInt || expert_ids.scalar_type() == at::kLong, kOp, "expert_ids",
                "be int32 or int64", expert_ids.scalar_type());
  MFX_CHECK_ARG(num_experts >= 1 && num_experts <= kMostExperts, kOp, "num_experts",
                c10::str("be in [1, ", kMostExperts, "]"), num_experts);
}

Outputs allocate(const Args& a) {
  const auto& [expert_ids, num_experts] = a;
  const auto options = expert_ids.options().dtype(at::kInt);
  const auto slots = expert_ids.sym_numel();
  return {at::empty({num_experts}, options), at::empty({num_experts + 1}, options), at::empty_symint({slots}, options),
          at::empty_symint({slots}, options)};
}

template <bool kMeta>
Outputs expert_layout(const Args& a) {
  const auto& [expert_ids, num_experts] = a;
  check_arguments(a);
  if constexpr (kMeta) return allocate(a);
  MFX_CHECK_ARG(expert_ids.numel() <= std::numeric_limits<int32_t>::max(), kOp, "expert_ids",
                "have at most 2^31 - 1 slots", expert_ids.numel());
  const at::Tensor ids = expert_ids.contiguous();
  Outputs outputs = allocate(a);
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
  launch(kOp, backend_of(kOp, "expert_ids", ids), {ids}, params, expert_layout_cpu,
         MFX_CUDA_FUNCTION(mfx_expert_layout_cuda), MFX_CUDA_FUNCTION(mfx_expert_layout_cuda_workspace));
  return outputs;
}

}  // namespace

// Integers in, integers out: nothing to differentiate, autograd falls through.
TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  Definition(m,
             "expert_layout(Tensor expert_ids, int num_experts) -> (Tensor counts, Tensor offsets, Tensor slot_order, "
             "Tensor position)")
      .kernel<&expert_layout<false>>({CPU, CUDA})
      .kernel<&expert_layout<true>>({Meta});
}

}  // namespace mfx
