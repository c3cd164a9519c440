// stick_attention_decode on a GPU: bound by reading the cache, which is read once, in 128-bit pieces, newest key first.
//
//   beta_j = sigmoid(scale q.k_j), A_j = beta_j prod_{m newer} (1 - beta_m), o = sum_j A_j v_j, r = prod (1 - beta_j)
//
// Two launches. The first walks slot 0 of every stick group (stick_attention_decode_plan.hpp); where sticks end there,
// or there are no older keys, it writes the result. The second walks the other slots and composes, (o1, r1) with the
// older (o2, r2) to (o1 + r1 o2, r1 r2): the last of 16 neighbours to finish composes the 16, and so on up a tree of
// fixed shape, so that timing shows in no bit.
#pragma once

#include "stick_attention/decode_walk.cuh"

namespace mfx::stick_decode {

template <typename T>
__device__ inline void store_result(const StickAttentionDecodeParams& p, const Group& group, int row, int d,
                                    float sum) {
  static_cast<T*>(
      p.out)[group.batch * p.out_strides.batch + group.head * p.out_strides.head +
             group.token(p, row) * p.out_strides.token + group.query_head(p, row) * p.out_strides.group + d] =
      from_float<T>(sum);
}

__device__ inline void store_remainder(const StickAttentionDecodeParams& p, const Group& group, int row, double stick) {
  static_cast<float*>(
      p.remainder)[((group.batch * p.num_new + group.token(p, row)) * p.num_kv_heads + group.head) * p.group_size +
                   group.query_head(p, row)] = static_cast<float>(stick);
}

// Calls visit(row, d) for every element of the group's rows, neighbouring threads at neighbouring d.
template <typename Visit>
__device__ inline void for_each_element(const StickAttentionDecodeParams& p, const Group& group, Visit visit) {
  const int dim = static_cast<int>(p.head_dim);
  for (int i = threadIdx.x; i < group.rows * dim; i += blockDim.x) visit(i / dim, i % dim);
}

// Index of a row of a slot's part.
__device__ inline std::int64_t part_row(const StickDecodePlan& plan, const Group& group, int slot, int row) {
  return (group.index * plan.slots() + slot) * plan.rows + row;
}

template <typename S>
__device__ inline void store_part(const Shared<S>& shared, const StickAttentionDecodeParams& p,
                                  const StickDecodePlan& plan, const StickDecodeWorkspace& work, const Group& group,
                                  int slot) {
  for_each_element(p, group, [&](int row, int d) {
    work.sums[part_row(plan, group, slot, row) * p.head_dim + d] = shared.sums[row][Shared<S>::sum_index(d)];
  });
  const int row = threadIdx.x;
  if (row < group.rows) work.sticks[part_row(plan, group, slot, row)] = shared.sticks[row];
}

template <typename S>
__device__ inline bool all_exhausted(const Shared<S>& shared, const Group& group, double epsilon) {
  bool all = true;
  for (int row = 0; row < group.rows; ++row) all = all && exhausted(shared.sticks[row], epsilon);
  return all;
}

// Composes `count` parts, slot, slot + stride.., newest first, into the first of them or, at the root, the result.
template <typename T, typename S>
__device__ void compose(const StickAttentionDecodeParams& p, const StickDecodePlan& plan,
                        const StickDecodeWorkspace& work, const Group& group, int slot, int stride, int count,
                        bool is_root) {
  __shared__ float left[StickDecodePlan::kRadix][S::kRows];  // of each stick when it comes to a part
  __shared__ double sticks[S::kRows];
  __shared__ int needed;
  if (threadIdx.x < 32) {
    const int row = threadIdx.x;
    double stick = row < group.rows ? 1 : 0;
    int i = 0;
    for (bool ended = false; i < count && !ended; ++i) {
      if (row < group.rows) {
        left[i][row] = static_cast<float>(stick);
        stick *= __ldcg(&work.sticks[part_row(plan, group, slot + i * stride, row)]);
      }
      ended = __all_sync(kAllLanes, row >= group.rows || exhausted(stick, p.stick_epsilon));
    }
    if (row < group.rows) sticks[row] = stick;
    if (row == 0) needed = i;
  }
  __syncthreads();
  for_each_element(p, group, [&](int row, int d) {
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < needed; ++i) {
      sum += left[i][row] * __ldcg(&work.sums[part_row(plan, group, slot + i * stride, row) * p.head_dim + d]);
    }
    if (is_root) {
      store_result<T>(p, group, row, d, sum);
    } else {
      work.sums[part_row(plan, group, slot, row) * p.head_dim + d] = sum;
    }
  });
  if (threadIdx.x < group.rows) {
    if (is_root) {
      store_remainder(p, group, threadIdx.x, sticks[threadIdx.x]);
    } else {
      work.sticks[part_row(plan, group, slot, threadIdx.x)] = sticks[threadIdx.x];
    }
  }
}

// Slot 0: the result if there is no need for older keys, and the start of the second launch's bookkeeping.
template <typename T, typename S>
__device__ void finish_newest(const Shared<S>& shared, const StickAttentionDecodeParams& p, const StickDecodePlan& plan,
                              const StickDecodeWorkspace& work, const Group& group, int older_keys) {
  const bool whole = older_keys == 0 || all_exhausted(shared, group, p.stick_epsilon);
  if (threadIdx.x == 0 && plan.older_slots > 0) work.ended[group.index] = whole ? 0 : plan.slots();
  if (whole) {
    for_each_element(p, group, [&](int row, int d) {
      store_result<T>(p, group, row, d, shared.sums[row][Shared<S>::sum_index(d)]);
    });
    if (threadIdx.x < group.rows) store_remainder(p, group, threadIdx.x, shared.sticks[threadIdx.x]);
    return;
  }
  store_part(shared, p, plan, work, group, 0);
  for (int i = threadIdx.x; i < plan.counters(); i += blockDim.x) {
    work.counters[group.index * plan.counters() + i] = i == 0 ? 1 : 0;  // slot 0 is there already
  }
}

// The block that arrives last at a node of the tree composes what came, and goes on to the node above.
template <typename T, typename S>
__device__ void climb(const StickAttentionDecodeParams& p, const StickDecodePlan& plan,
                      const StickDecodeWorkspace& work, const Group& group, int slot, int slots) {
  __shared__ int ended;
  __shared__ bool is_last;
  unsigned* counters = work.counters + group.index * plan.counters();
  for (int stride = 1;; stride *= StickDecodePlan::kRadix) {
    const int span = stride * StickDecodePlan::kRadix, node = slot / span;
    const int parts = (slots - node * span + stride - 1) / stride;
    const int count = parts < StickDecodePlan::kRadix ? parts : StickDecodePlan::kRadix;
    __threadfence();  // this block's part, before its arrival
    __syncthreads();
    if (threadIdx.x == 0) {
      is_last = atomicAdd(&counters[node], 1) == static_cast<unsigned>(count) - 1;
      __threadfence();  // the others' parts, after their arrival
      ended = __ldcg(&work.ended[group.index]);
    }
    __syncthreads();
    if (!is_last) return;
    slot = node * span;
    const bool is_root = slots <= span;
    if (slot <= ended) compose<T, S>(p, plan, work, group, slot, stride, count, is_root);
    if (is_root) return;
    counters += plan.counters_per_level();
  }
}

// The keys of a slot, end - 1 .. begin.
struct SlotKeys {
  int older_keys;  // than those of slot 0
  int slots;       // that have keys
  int begin, end;

  __device__ SlotKeys(const StickAttentionDecodeParams& p, const StickDecodePlan& plan, const Group& group, int slot) {
    const int length = clamped_length(p, group.batch);
    older_keys = length > StickDecodePlan::kNewestKeys ? length - StickDecodePlan::kNewestKeys : 0;
    slots = 1;
    begin = older_keys;
    end = length;
    if (slot == 0 || older_keys == 0) return;
    slots = plan.used_slots(older_keys);
    end = older_keys - (slot - 1) * plan.slot_keys(older_keys);
    begin = end > plan.slot_keys(older_keys) ? end - plan.slot_keys(older_keys) : 0;
  }
};

template <typename T, typename S, bool kKIsV>
__device__ void decode(const StickAttentionDecodeParams& p, const StickDecodePlan& plan,
                       const StickDecodeWorkspace& work, bool aligned, int slot) {
  __shared__ Shared<S> shared;
  __shared__ int ended;
  const Group group(p, plan, blockIdx.x);
  const SlotKeys keys(p, plan, group, slot);
  bool needed = true;
  if (slot > 0) {
    if (keys.older_keys == 0) return;
    // One reading for the whole block: others may write it meanwhile.
    if (threadIdx.x == 0) ended = __ldcg(&work.ended[group.index]);
    __syncthreads();
    if (slot >= keys.slots || ended == 0) return;  // 0: slot 0 was the result
    needed = slot < ended;
  }
  if (needed) {
    walk<T, S, kKIsV>(shared, p, group, aligned, keys.begin, keys.end);
    if (any_not_finite(shared, p.head_dim)) {
      const Group same_group = Group::recompute(p, plan);
      const SlotKeys same_keys(p, plan, same_group, slot);
      sum_row_by_row<T, S>(shared, p, same_group, same_keys.begin, same_keys.end);
    }
  }
  if (slot == 0) return finish_newest<T>(shared, p, plan, work, group, keys.older_keys);
  if (needed) {
    store_part(shared, p, plan, work, group, slot);
    // Where a slot alone ends all sticks, what is older is not needed, whatever the newer slots hold.
    if (threadIdx.x == 0 && all_exhausted(shared, group, p.stick_epsilon)) atomicMin(&work.ended[group.index], slot);
  }
  climb<T, S>(p, plan, work, group, slot, keys.slots);
}

}  // namespace mfx::stick_decode
