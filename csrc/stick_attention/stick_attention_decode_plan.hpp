// How stick_attention_decode_cuda cuts a cache into pieces: sizes that host and kernels have to agree on.
//
// A *stick group* is what one block walks for: up to kMaxRows query rows (token, query head) of one K/V head of one
// sequence. Its cache is cut from the newest key backwards into slots: slot 0 holds the kNewestKeys newest keys, and
// the others share what is older evenly. How many slots there may be follows from shapes, where they lie from the
// length of the sequence, which only the device knows.
#pragma once

#include "core/divide.hpp"
#include "core/workspace.hpp"
#include "moduleformer_ext/stick_attention_decode.hpp"

#if defined(__CUDACC__)
#define MFX_HOST_DEVICE __host__ __device__
#else
#define MFX_HOST_DEVICE
#endif

namespace mfx {

struct StickDecodePlan {
  static constexpr int kMaxRows = 8;
  static constexpr int kNewestKeys = 64;   // where most sticks end; walked first
  static constexpr int kMinSlotKeys = 64;  // fewer, and writing and adding up results costs more than reading keys
  static constexpr int kBlocksWanted = 256;
  static constexpr int kRadix = 16;  // slots that one block composes
  static constexpr int kLevels = 3;  // kRadix^kLevels > kBlocksWanted

  std::int64_t groups;         // stick groups
  std::int64_t groups_per_kv;  // per sequence and K/V head
  int rows;                    // per group; the last group of a head may have fewer
  int older_slots;             // at most

  static constexpr StickDecodePlan of(const StickAttentionDecodeParams& p) {
    StickDecodePlan plan{};
    const std::int64_t rows = p.num_new * p.group_size;
    plan.groups_per_kv = ceil_div(rows, kMaxRows);
    plan.rows = 2;
    while (plan.rows < kMaxRows && plan.rows < rows) plan.rows *= 2;
    plan.groups = p.batch * p.num_kv_heads * plan.groups_per_kv;
    const std::int64_t most = p.max_keys <= kNewestKeys ? 0 : (p.max_keys - 1) / kMinSlotKeys;
    const std::int64_t wanted = plan.groups == 0 ? 0 : ceil_div(std::int64_t{kBlocksWanted}, plan.groups);
    plan.older_slots = static_cast<int>(most < wanted ? most : wanted);
    return plan;
  }

  MFX_HOST_DEVICE constexpr int slots() const { return older_slots + 1; }
  MFX_HOST_DEVICE constexpr int counters_per_level() const { return slots() / kRadix + 1; }
  MFX_HOST_DEVICE constexpr int counters() const { return kLevels * counters_per_level(); }

  // Keys per older slot of a sequence that has `older` keys beyond the newest ones, and how many slots that fills.
  MFX_HOST_DEVICE constexpr int slot_keys(int older) const {
    const int even = (older + older_slots - 1) / older_slots;
    return even < kMinSlotKeys ? kMinSlotKeys : (even + 15) / 16 * 16;
  }
  MFX_HOST_DEVICE constexpr int used_slots(int older) const {
    const int keys = slot_keys(older);
    return 1 + (older + keys - 1) / keys;
  }
};

// What a slot leaves: per row the weighted sum of its values for a whole stick, and how much of one it leaves.
struct StickDecodeWorkspace {
  double* sticks;      // [groups, slots, rows]
  float* sums;         // [groups, slots, rows, head_dim]
  int* ended;          // [groups], a slot after which no stick is left
  unsigned* counters;  // [groups, counters], finished children of each node of the tree that composes slots

  StickDecodeWorkspace(Workspace& workspace, const StickDecodePlan& plan, std::int64_t head_dim) {
    const std::int64_t parts = plan.groups * plan.slots() * plan.rows;
    sticks = workspace.take<double>(parts);
    sums = workspace.take<float>(parts * head_dim);
    ended = workspace.take<int>(plan.groups);
    counters = workspace.take<unsigned>(plan.groups * plan.counters());
  }
};

}  // namespace mfx
