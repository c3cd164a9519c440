// expert_layout: group routed slots by expert with a stable counting sort.
//
// Slot s = t * K + j is choice j of token t. Slots of one expert become consecutive positions, experts in ascending
// order, slots of one expert in ascending order (stable), so that a grouped GEMM can walk them.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

struct ExpertLayoutParams {
  const void* expert_ids;  // [num_slots], int32 or int64, each in [0, num_experts)
  bool ids_are_int64;
  std::int64_t num_slots;
  std::int64_t num_experts;
  std::int32_t* counts;       // [num_experts]
  std::int32_t* offsets;      // [num_experts + 1], exclusive prefix sums of counts
  std::int32_t* slot_order;   // [num_slots], position -> slot
  std::int32_t* position;     // [num_slots], slot -> position (inverse of slot_order)
  void* workspace = nullptr;  // CUDA only: as many bytes as mfx_expert_layout_cuda_workspace says
};

// Returns an error, with nothing written to slot_order or position, when an id is out of range.
Status expert_layout_cpu(const ExpertLayoutParams& params);

extern "C" {
// An id out of range counts as the nearest expert, and the kernel reports it.
Status mfx_expert_layout_cuda(const ExpertLayoutParams& params, Stream stream);
// An id out of range that a kernel has reported since the last call; 0 if none has. Waits for nothing.
std::int64_t mfx_expert_layout_cuda_take_bad_id();
std::int64_t mfx_expert_layout_cuda_workspace(const ExpertLayoutParams& params);
}

}  // namespace mfx
