// Counting sort in two passes over the ids. With many slots the passes run over fixed chunks in parallel: each chunk
// counts its experts, a prefix over (expert, chunk) gives every chunk its first position per expert, and the second
// pass writes. The result is the same for every chunking, so it cannot depend on the number of threads.
#include "moduleformer_ext/expert_layout.hpp"

#include <algorithm>
#include <atomic>

#include "core/aligned_buffer.hpp"
#include "core/parallel.hpp"

namespace mfx {
namespace {

constexpr std::int64_t kSlotsPerChunk = 1 << 15;
constexpr std::int64_t kMaxChunks = 64;

template <typename Id>
Status expert_layout(const ExpertLayoutParams& p) {
  const Id* ids = static_cast<const Id*>(p.expert_ids);
  // No more cells to count in than slots, or than experts.
  const std::int64_t chunks =
      std::clamp<std::int64_t>(p.num_slots / std::max(kSlotsPerChunk, p.num_experts), 1, kMaxChunks);
  const std::int64_t per_chunk = (p.num_slots + chunks - 1) / chunks;
  AlignedBuffer<std::int32_t> next(chunks * p.num_experts);  // [chunk][expert]: counts, then next free positions
  std::fill_n(next.data(), chunks * p.num_experts, 0);

  std::atomic<std::int64_t> out_of_range{-1};
  parallel_tasks(chunks, [&](std::int64_t chunk) {
    std::int32_t* counts = next.data() + chunk * p.num_experts;
    const std::int64_t end = std::min(p.num_slots, (chunk + 1) * per_chunk);
    for (std::int64_t slot = chunk * per_chunk; slot < end; ++slot) {
      if (ids[slot] < 0 || ids[slot] >= p.num_experts) {
        out_of_range = slot;
        return;
      }
      ++counts[ids[slot]];
    }
  });
  if (out_of_range >= 0) {
    return {.message = "expert_ids must lie in [0, num_experts)", .got = ids[out_of_range], .index = out_of_range};
  }

  std::int32_t position = 0;
  for (std::int64_t expert = 0; expert < p.num_experts; ++expert) {
    p.offsets[expert] = position;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::int32_t& cell = next[chunk * p.num_experts + expert];
      const std::int32_t count = cell;
      cell = position;
      position += count;
    }
    p.counts[expert] = position - p.offsets[expert];
  }
  p.offsets[p.num_experts] = position;

  parallel_tasks(chunks, [&](std::int64_t chunk) {
    std::int32_t* free = next.data() + chunk * p.num_experts;
    const std::int64_t end = std::min(p.num_slots, (chunk + 1) * per_chunk);
    for (std::int64_t slot = chunk * per_chunk; slot < end; ++slot) {
      const std::int32_t target = free[ids[slot]]++;
      p.slot_order[target] = static_cast<std::int32_t>(slot);
      p.position[slot] = target;
    }
  });
  return {};
}

}  // namespace

Status expert_layout_cpu(const ExpertLayoutParams& params) {
  return params.ids_are_int64 ? expert_layout<std::int64_t>(params) : expert_layout<std::int32_t>(params);
}

}  // namespace mfx
