// stick_attention_decode on a GPU: bound by reading the cache, which is read once, in 128-bit pieces, newest key first.
//
//   beta_j = sigmoid(scale q.k_j),  A_j = beta_j prod_{m newer} (1 - beta_m),  o = sum_j A_j v_j,  r = prod (1 -
//   beta_j)
//
// Two launches. The first walks slot 0 of every stick group (stick_attention_decode_plan.hpp); where sticks end there,
// or there are no older keys, it writes the result. The second walks the other slots and composes, (o1, r1) with the
// older (o2, r2) to (o1 + r1 o2, r1 r2): the last of 16 neighbours to finish composes the 16, and so on up a tree of
// fixed shape, so that timing shows in no bit.
//
// One block walks one slot in tiles. A key is read by the lanes of kLanes neighbours (or several warps), each of which
// owns one 16-byte chunk of the head dimension: of q, of the sums and of every key and value, all in registers, so that
// where K is V a key is loaded once for both products. Partial dot products of kKeys keys x kRows rows meet in a
// transposing butterfly, about one shuffle each. One warp per row then scans the tile: nothing of the scan is rounded
// below binary32, and the stick itself is carried in binary64, since a long walk multiplies it thousands of times.
#pragma once

#include "device/convert.cuh"
#include "device/vector_memory.cuh"
#include "device/warp.cuh"
#include "stick_attention/stick_attention_decode_plan.hpp"

namespace mfx::stick_decode {

using namespace mfx::device;

constexpr float kScoreBound = 80.0f;  // beyond, beta is 0 or 1 to every digit, and 1 - beta is still a normal number

template <typename T, int kLanesPerKey, int kRowsPerGroup>
struct Shape {
  static constexpr int kLanes = kLanesPerKey;  // 32: and as many warps as the head dimension needs
  static constexpr int kRows = kRowsPerGroup;
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kThreads = kLanes == 32 ? 256 : 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kKeys = kLanes == 32 && kRows <= 4 && sizeof(T) == 2 ? 8 : 4;  // of a tile, per thread
  static constexpr int kMaxTile = kThreads / kLanes * kKeys;
  static constexpr int kMaxDim = kLanes == 32 ? 1024 : kLanes * kVec;
};

// Where a thread stands: keys key_lane * kKeys.. of each tile, head dimensions d...
template <typename S>
struct Place {
  int warp, lane;
  int warps_per_key, key_lanes;  // key_lanes * kKeys keys make a tile
  int key_lane, d;
  bool active;

  __device__ explicit Place(std::int64_t head_dim) : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    constexpr int kChunk = S::kLanes * S::kVec;
    warps_per_key = S::kLanes == 32 ? (static_cast<int>(head_dim) + kChunk - 1) / kChunk : 1;
    key_lanes = S::kWarps / warps_per_key * (32 / S::kLanes);
    key_lane = warp / warps_per_key * (32 / S::kLanes) + lane / S::kLanes;
    d = (warp % warps_per_key * S::kLanes + lane % S::kLanes) * S::kVec;
    active = d < head_dim && key_lane < key_lanes;
  }
  __device__ int tile() const { return key_lanes * S::kKeys; }
};

// The rows one block works for.
struct Group {
  std::int64_t index, batch, head, first_row;
  int rows;

  __device__ Group(const StickAttentionDecodeParams& p, const StickDecodePlan& plan, std::int64_t index)
      : index(index),
        batch(index / (plan.groups_per_kv * p.num_kv_heads)),
        head(index / plan.groups_per_kv % p.num_kv_heads),
        first_row(index % plan.groups_per_kv * StickDecodePlan::kMaxRows) {
    const std::int64_t left = p.num_new * p.group_size - first_row;
    rows = static_cast<int>(left < plan.rows ? left : plan.rows);
  }
  __device__ std::int64_t token(const StickAttentionDecodeParams& p, int row) const {
    return (first_row + row) / p.group_size;
  }
  __device__ std::int64_t query_head(const StickAttentionDecodeParams& p, int row) const {
    return (first_row + row) % p.group_size;
  }
};

// The lengths live on the device, where nobody can be told about a wrong one: nothing outside the cache is read.
__device__ inline int clamped_length(const StickAttentionDecodeParams& p, std::int64_t batch) {
  const int length = p.lengths[batch];
  return length < 0 ? 0 : length > p.max_keys ? static_cast<int>(p.max_keys) : length;
}

// A stick that is NaN has ended, too: nothing older can change the result.
__device__ inline bool has_ended(double stick, double epsilon) {
  return epsilon > 0 && !(stick > epsilon);
}

template <typename T>
struct Chunk {
  uint4 bits;

  // 16 bytes; one by one where an address is not a multiple of 16.
  __device__ static Chunk load(const T* from, bool aligned) {
    if (aligned) return {load_global_128_constant(from)};
    constexpr int kVec = 16 / sizeof(T);
    alignas(16) T words[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) words[i] = from[i];
    return {*reinterpret_cast<const uint4*>(words)};
  }
  __device__ void widen(float (&x)[16 / sizeof(T)]) const {
    const std::uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(word[i]);
      } else {
        x[2 * i] = low_of_pair<T>(word[i]);
        x[2 * i + 1] = high_of_pair<T>(word[i]);
      }
    }
  }
};

// kKeys keys (or values) of a tile, this thread's chunk of each; zeros for keys older than `begin`.
template <typename T, typename S>
__device__ inline void load_tile(Chunk<T> (&chunk)[S::kKeys], const Place<S>& at, const T* base,
                                 std::int64_t key_stride, int first, int begin, bool aligned) {
#pragma unroll
  for (int j = 0; j < S::kKeys; ++j) {
    const int key = first + at.key_lane * S::kKeys + j;
    chunk[j].bits = make_uint4(0, 0, 0, 0);
    if (at.active && key >= begin) chunk[j] = Chunk<T>::load(base + key * key_stride + at.d, aligned);
  }
}

template <typename S>
struct Shared {
  static constexpr int kPitch = S::kMaxTile + S::kKeys;  // spreads the rows over the banks
  alignas(16) float weights[S::kRows][S::kMaxTile];
  float scores[S::kWarps][S::kRows][kPitch];     // partial dot products, per warp of a key
  alignas(16) float sums[S::kRows][S::kMaxDim];  // by sum_index()
  double sticks[S::kRows];

  // Fours of neighbouring chunks lie side by side, so that a warp that stores its chunks meets every bank once.
  __device__ static int sum_index(int d) {
    return (d % S::kVec / 4 * (S::kMaxDim / S::kVec) + d / S::kVec) * 4 + d % 4;
  }
};

// What sum_and_spread() left in this lane.
template <typename S>
__device__ inline void store_scores(Shared<S>& shared, const Place<S>& at, const float (&sums)[S::kRows * S::kKeys]) {
  constexpr int kCount = S::kRows * S::kKeys;
  constexpr int kEach = kCount < S::kLanes ? 1 : kCount / S::kLanes;
  constexpr int kCopies = kCount < S::kLanes ? S::kLanes / kCount : 1;  // lanes with the same sum
  const int lane = at.lane % S::kLanes;
  if (lane % kCopies != 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int index = lane / kCopies * kEach + i;
    shared.scores[at.warp % at.warps_per_key][index / S::kKeys][at.key_lane * S::kKeys + index % S::kKeys] = sums[i];
  }
}

// Turns a row's scores of the keys first..first + tile into weights A for a whole stick times `stick`, which it
// updates. One warp; each lane has two neighbouring keys.
template <typename S>
__device__ inline void scan_row(Shared<S>& shared, const StickAttentionDecodeParams& p, const Group& group,
                                const Place<S>& at, int row, int first, int begin, int last, double& stick) {
  float take[2] = {0, 0}, leave[2] = {1, 1};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 2 * at.lane + i, key = first + j;
    const bool visible = j < at.tile() && key >= begin && key <= last;
    if (!visible) continue;
    if (p.key_padding_mask != nullptr &&
        !p.key_padding_mask[group.batch * p.mask_batch_stride + key * p.mask_key_stride]) {
      continue;
    }
    float s = 0;
    for (int part = 0; part < at.warps_per_key; ++part) s += shared.scores[part][row][j];
    s *= static_cast<float>(p.scale);
    s = s > kScoreBound ? kScoreBound : s < -kScoreBound ? -kScoreBound : s;  // NaN passes through
    const float e = expf(s);
    leave[i] = 1.0f / (1.0f + e);
    take[i] = e * leave[i];
  }
  float left = leave[0] * leave[1];  // of this lane's and, step by step, more newer keys
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float newer = __shfl_down_sync(kAllLanes, left, step);
    if (at.lane + step < 32) left *= newer;
  }
  const float newer = __shfl_down_sync(kAllLanes, left, 1);
  const float before = at.lane == 31 ? 1.0f : newer;
  const float weight1 = take[1] * before, weight0 = take[0] * (before * leave[1]);
  const float mass = lanes_sum(weight0 + weight1);
  const float whole = __shfl_sync(kAllLanes, left, 0);
  const float scale = static_cast<float>(stick);
  if (2 * at.lane < at.tile()) {
    *reinterpret_cast<float2*>(&shared.weights[row][2 * at.lane]) = make_float2(weight0 * scale, weight1 * scale);
  }
  // 1 - mass keeps a long tail of tiny weights exact, the product keeps a nearly used-up stick exact.
  stick *= mass < 0.5f ? 1.0 - static_cast<double>(mass) : static_cast<double>(whole);
}

// Walks the keys end - 1 .. begin. On return shared.sums and shared.sticks hold what they take from whole sticks.
template <typename T, typename S, bool kShared>
__device__ void walk(Shared<S>& shared, const StickAttentionDecodeParams& p, const Group& group, bool aligned,
                     int begin, int end) {
  constexpr int kRounds = (S::kRows + S::kWarps - 1) / S::kWarps;
  const Place<S> at(p.head_dim);
  const T* const keys =
      static_cast<const T*>(p.k_cache) + group.batch * p.k_batch_stride + group.head * p.k_head_stride;
  const T* const values =
      static_cast<const T*>(p.v_cache) + group.batch * p.v_batch_stride + group.head * p.v_head_stride;
  const int newest_of_first_token =
      clamped_length(p, group.batch) - static_cast<int>(p.num_new) - (p.attend_current ? 0 : 1);

  Chunk<T> now[S::kKeys], then[S::kKeys];  // K, and the older tile's K where K is V, else V
  load_tile<T, S>(now, at, keys, p.k_key_stride, end - at.tile(), begin, aligned);
  float q[S::kRows][S::kVec] = {}, sum[S::kRows][S::kVec] = {};
#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
    if (row >= group.rows || !at.active) continue;
    const T* const from = static_cast<const T*>(p.q) + group.batch * p.q_batch_stride + group.head * p.q_head_stride +
                          group.token(p, row) * p.q_token_stride + group.query_head(p, row) * p.q_group_stride;
    Chunk<T>::load(from + at.d, aligned).widen(q[row]);
  }
  double stick[kRounds];  // of the rows this warp scans: warp, warp + kWarps..
#pragma unroll
  for (int i = 0; i < kRounds; ++i) stick[i] = 1;

  for (int first = end - at.tile();; first -= at.tile()) {
    if constexpr (kShared) {
      load_tile<T, S>(then, at, keys, p.k_key_stride, first - at.tile(), begin, aligned);
    } else {
      load_tile<T, S>(then, at, values, p.v_key_stride, first, begin, aligned);
    }
    float dot[S::kRows * S::kKeys];
#pragma unroll
    for (int j = 0; j < S::kKeys; ++j) {
      float x[S::kVec];
      now[j].widen(x);
#pragma unroll
      for (int row = 0; row < S::kRows; ++row) {
        float s = x[0] * q[row][0];
#pragma unroll
        for (int i = 1; i < S::kVec; ++i) s += x[i] * q[row][i];
        dot[row * S::kKeys + j] = s;
      }
    }
    if constexpr (!kShared) load_tile<T, S>(now, at, keys, p.k_key_stride, first - at.tile(), begin, aligned);

    sum_and_spread<S::kLanes, S::kRows * S::kKeys>(dot);
    store_scores<S>(shared, at, dot);
    __syncthreads();
    bool ended = true;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = at.warp + i * S::kWarps;
      if (row >= S::kRows) break;
      const int last = newest_of_first_token + static_cast<int>(group.token(p, row));
      scan_row(shared, p, group, at, row, first, begin, last, stick[i]);
      ended = ended && (row >= group.rows || has_ended(stick[i], p.stick_epsilon));
    }
    const bool all_ended = __syncthreads_and(ended);
    if (at.active) {
#pragma unroll
      for (int j = 0; j < S::kKeys; ++j) {
        float x[S::kVec];
        (kShared ? now : then)[j].widen(x);
#pragma unroll
        for (int row = 0; row < S::kRows; ++row) {
          const float weight = shared.weights[row][at.key_lane * S::kKeys + j];
#pragma unroll
          for (int i = 0; i < S::kVec; ++i) sum[row][i] += weight * x[i];
        }
      }
    }
    if (all_ended || first <= begin) break;
    if constexpr (kShared) {
#pragma unroll
      for (int j = 0; j < S::kKeys; ++j) now[j] = then[j];
    }
  }

#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
#pragma unroll
    for (int i = 0; i < S::kVec; ++i) {
#pragma unroll
      for (int step = S::kLanes; step < 32; step *= 2) {
        sum[row][i] += __shfl_xor_sync(kAllLanes, sum[row][i], step);
      }
    }
  }
  for (int turn = 0; turn < S::kWarps / at.warps_per_key; ++turn) {
    if (at.warp / at.warps_per_key == turn && at.lane < S::kLanes && at.active) {
#pragma unroll
      for (int row = 0; row < S::kRows; ++row) {
#pragma unroll
        for (int i = 0; i < S::kVec; i += 4) {
          float4& total = *reinterpret_cast<float4*>(&shared.sums[row][Shared<S>::sum_index(at.d + i)]);
          const float4 newer = turn == 0 ? make_float4(0, 0, 0, 0) : total;
          total = make_float4(newer.x + sum[row][i], newer.y + sum[row][i + 1], newer.z + sum[row][i + 2],
                              newer.w + sum[row][i + 3]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (at.lane == 0 && at.warp + i * S::kWarps < S::kRows) shared.sticks[at.warp + i * S::kWarps] = stick[i];
  }
  __syncthreads();
}

template <typename T>
__device__ inline void store_result(const StickAttentionDecodeParams& p, const Group& group, int row, int d,
                                    float sum) {
  static_cast<T*>(p.out)[group.batch * p.out_batch_stride + group.head * p.out_head_stride +
                         group.token(p, row) * p.out_token_stride + group.query_head(p, row) * p.out_group_stride + d] =
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
__device__ inline bool all_ended(const Shared<S>& shared, const Group& group, double epsilon) {
  bool ended = true;
  for (int row = 0; row < group.rows; ++row) ended = ended && has_ended(shared.sticks[row], epsilon);
  return ended;
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
      ended = __all_sync(kAllLanes, row >= group.rows || has_ended(stick, p.stick_epsilon));
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
  const bool whole = older_keys == 0 || all_ended(shared, group, p.stick_epsilon);
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
    counters += plan.slots() / StickDecodePlan::kRadix + 1;
  }
}

template <typename T, typename S, bool kShared>
__device__ void decode(const StickAttentionDecodeParams& p, const StickDecodePlan& plan,
                       const StickDecodeWorkspace& work, bool aligned, int slot) {
  __shared__ Shared<S> shared;
  __shared__ int ended;
  const Group group(p, plan, blockIdx.x);
  const int length = clamped_length(p, group.batch);
  const int older_keys = length > StickDecodePlan::kNewestKeys ? length - StickDecodePlan::kNewestKeys : 0;
  int begin = older_keys, end = length, slots = 1;
  bool needed = true;
  if (slot > 0) {
    if (older_keys == 0) return;
    // One reading for the whole block: others may write it meanwhile.
    if (threadIdx.x == 0) ended = __ldcg(&work.ended[group.index]);
    __syncthreads();
    slots = plan.used_slots(older_keys);
    if (slot >= slots || ended == 0) return;  // 0: slot 0 was the result
    needed = slot < ended;
    end = older_keys - (slot - 1) * plan.slot_keys(older_keys);
    begin = end > plan.slot_keys(older_keys) ? end - plan.slot_keys(older_keys) : 0;
  }
  if (needed) walk<T, S, kShared>(shared, p, group, aligned, begin, end);
  if (slot == 0) return finish_newest<T>(shared, p, plan, work, group, older_keys);
  if (needed) {
    store_part(shared, p, plan, work, group, slot);
    // Where a slot alone ends all sticks, what is older is not needed, whatever the newer slots hold.
    if (threadIdx.x == 0 && all_ended(shared, group, p.stick_epsilon)) atomicMin(&work.ended[group.index], slot);
  }
  climb<T, S>(p, plan, work, group, slot, slots);
}

}  // namespace mfx::stick_decode
