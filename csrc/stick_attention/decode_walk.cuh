// How a block of stick_attention_decode walks one slot of a cache (decode.cuh), tile by tile, the newest first:
//
//   S = q K_tile^T,  weights = scan(S),  o += weights V_tile
//
// A key is read by the lanes of kLanes neighbours (or several warps), each of which owns one 16-byte chunk of the head
// dimension: of q, of the sums and of every key and value, all in registers, so that where K is V a key is loaded once
// for both products. Partial dot products of kKeys keys x kRows rows meet in a transposing butterfly, about one shuffle
// each. One warp per row then scans the tile: nothing of the scan is rounded below binary32, and the stick itself is
// carried in binary64, since a long walk multiplies it thousands of times. Beside reading the cache that costs nothing,
// nor do the exponential and the quotient that the scan of the tiled kernels (stick_break.cuh) has only nearly.
#pragma once

#include "ptx/regalloc.cuh"
#include "ptx/vector_memory.cuh"
#include "stick_attention/stick_attention_decode_plan.hpp"
#include "stick_attention/stick_break.cuh"
#include "stick_attention/stick_exhausted.hpp"
#include "tile/chunk.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::stick_decode {

using namespace mfx::device;
using stick::rem_after;

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
  // That of the block, computed anew: kept from before the walk it would take registers all along.
  __device__ static Group recompute(const StickAttentionDecodeParams& p, const StickDecodePlan& plan) {
    std::uint32_t block = blockIdx.x;
    hide_from_optimizer(block);
    return {p, plan, block};
  }

  __device__ std::int64_t token(const StickAttentionDecodeParams& p, int row) const {
    return (first_row + row) / p.group_size;
  }
  __device__ std::int64_t query_head(const StickAttentionDecodeParams& p, int row) const {
    return (first_row + row) % p.group_size;
  }
  template <typename T>
  __device__ const T* query(const StickAttentionDecodeParams& p, int row) const {
    return static_cast<const T*>(p.q) + batch * p.q_strides.batch + head * p.q_strides.head +
           token(p, row) * p.q_strides.token + query_head(p, row) * p.q_strides.group;
  }
};

// The lengths live on the device, where nobody can be told about a wrong one: nothing outside the cache is read.
__device__ inline int clamped_length(const StickAttentionDecodeParams& p, std::int64_t batch) {
  const int length = p.lengths[batch];
  return length < 0 ? 0 : length > p.max_keys ? static_cast<int>(p.max_keys) : length;
}

template <typename T>
struct Chunk {
  uint4 bits;

  // 16 bytes; one by one where an address is not a multiple of 16.
  __device__ static Chunk load(const T* from, bool aligned) {
    return {aligned ? load_global_128_constant(from) : load_unaligned_chunk(from)};
  }
  __device__ void widen(float (&x)[16 / sizeof(T)]) const { unpack_chunk<T>(bits, x); }
};

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

// The share of the stick that comes to a key which it takes, beta, and leaves, u = 1 - beta.
struct Shares {
  float beta, u;

  __device__ explicit Shares(float s) {
    s = s > kScoreBound ? kScoreBound : s < -kScoreBound ? -kScoreBound : s;  // NaN passes through
    const float e = expf(s);
    u = 1.0f / (1.0f + e);
    beta = e * u;
  }
};

// The newest key that the first token sees.
__device__ inline int newest_of_first_token(const StickAttentionDecodeParams& p, const Group& group) {
  return clamped_length(p, group.batch) - static_cast<int>(p.num_new) - (p.attend_current ? 0 : 1);
}

__device__ inline bool is_kept(const StickAttentionDecodeParams& p, const Group& group, int key) {
  return p.key_padding_mask == nullptr ||
         p.key_padding_mask[group.batch * p.mask_batch_stride + key * p.mask_key_stride];
}

template <typename T>
__device__ inline const T* cached_keys(const StickAttentionDecodeParams& p, const Group& group) {
  return static_cast<const T*>(p.k_cache) + group.batch * p.k_strides.batch + group.head * p.k_strides.head;
}
template <typename T>
__device__ inline const T* cached_values(const StickAttentionDecodeParams& p, const Group& group) {
  return static_cast<const T*>(p.v_cache) + group.batch * p.v_strides.batch + group.head * p.v_strides.head;
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
    if (!visible || !is_kept(p, group, key)) continue;
    float s = 0;
    for (int part = 0; part < at.warps_per_key; ++part) s += shared.scores[part][row][j];
    const Shares shares(s * static_cast<float>(p.scale));
    take[i] = shares.beta;
    leave[i] = shares.u;
  }
  const LaneScan newer = lanes_later_product<kWarp>(leave[0] * leave[1]);
  const float weight1 = take[1] * newer.beyond, weight0 = take[0] * (newer.beyond * leave[1]);
  const float mass = lanes_sum(weight0 + weight1);
  const float scale = static_cast<float>(stick);
  if (2 * at.lane < at.tile()) {
    *reinterpret_cast<float2*>(&shared.weights[row][2 * at.lane]) = make_float2(weight0 * scale, weight1 * scale);
  }
  stick = rem_after(stick, stick * mass, newer.all);
}

// shared.sums of the keys end - 1 .. begin again, from the keys that a row sees alone: a weight of 0 does not keep NaN
// or infinity of others from a sum. A warp per row, lanes on the head dimension.
template <typename T, typename S>
__device__ void sum_row_by_row(Shared<S>& shared, const StickAttentionDecodeParams& p, const Group& group, int begin,
                               int end) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < group.rows; row += S::kWarps) {
    const T* const q = group.query<T>(p, row);
    const auto sum = [&](int d) -> float& { return shared.sums[row][Shared<S>::sum_index(d)]; };
    for (int d = lane; d < p.head_dim; d += 32) sum(d) = 0;
    double stick = 1;
    const int newest = newest_of_first_token(p, group) + static_cast<int>(group.token(p, row));
#pragma unroll 1
    for (int key = min(end - 1, newest); key >= begin; --key) {
      if (exhausted(stick, p.stick_epsilon)) break;
      if (!is_kept(p, group, key)) continue;
      const T* const k = cached_keys<T>(p, group) + key * p.k_strides.token;
      const T* const v = cached_values<T>(p, group) + key * p.v_strides.token;
      float score = 0;
      for (int d = lane; d < p.head_dim; d += 32) score += to_float(q[d]) * to_float(k[d]);
      const Shares shares(lanes_sum(score) * static_cast<float>(p.scale));
      const float weight = shares.beta * static_cast<float>(stick);
      for (int d = lane; d < p.head_dim; d += 32) sum(d) += weight * to_float(v[d]);
      stick *= shares.u;
    }
  }
  __syncthreads();
}

// This thread's chunks of the keys of a tile and of its values, which are the keys where K is V. What is read next is
// on its way to registers while the other is used.
template <typename T, typename S, bool kKIsV>
class CachePipeline {
 public:
  // Starts with the keys end - 1 ..; there are none older than `begin`.
  __device__ CachePipeline(const StickAttentionDecodeParams& p, const Group& group, const Place<S>& at, bool aligned,
                           int begin, int end)
      : at_(at),
        keys_(cached_keys<T>(p, group)),
        values_(cached_values<T>(p, group)),
        key_stride_(p.k_strides.token),
        value_stride_(p.v_strides.token),
        begin_(begin),
        aligned_(aligned) {
    load(now_, keys_, key_stride_, end - at.tile());
  }

  // The tile that begins at `first`: its keys are there, and its values, or the keys of the older one, on their way.
  __device__ void take(int first) {
    if constexpr (kKIsV) {
      load(then_, keys_, key_stride_, first - at_.tile());
    } else {
      load(then_, values_, value_stride_, first);
    }
  }
  __device__ const Chunk<T>& key(int j) const { return now_[j]; }
  __device__ const Chunk<T>& value(int j) const { return (kKIsV ? now_ : then_)[j]; }

  // After the last use of its keys, and of its values.
  __device__ void keys_read(int first) {
    if constexpr (!kKIsV) load(now_, keys_, key_stride_, first - at_.tile());
  }
  __device__ void values_read() {
    if constexpr (kKIsV) {
#pragma unroll
      for (int j = 0; j < S::kKeys; ++j) now_[j] = then_[j];
    }
  }

 private:
  // Zeros for keys older than `begin`.
  __device__ void load(Chunk<T> (&chunk)[S::kKeys], const T* base, std::int64_t key_stride, int first) const {
#pragma unroll
    for (int j = 0; j < S::kKeys; ++j) {
      const int key = first + at_.key_lane * S::kKeys + j;
      chunk[j].bits = make_uint4(0, 0, 0, 0);
      if (at_.active && key >= begin_) chunk[j] = Chunk<T>::load(base + key * key_stride + at_.d, aligned_);
    }
  }

  const Place<S>& at_;
  const T *const keys_, *const values_;
  const std::int64_t key_stride_, value_stride_;
  const int begin_;
  const bool aligned_;
  Chunk<T> now_[S::kKeys], then_[S::kKeys];
};

// This thread's part of the dot products of its keys with all rows.
template <typename S, typename Kv>
__device__ inline void dot_products(float (&dot)[S::kRows * S::kKeys], const float (&q)[S::kRows][S::kVec],
                                    const Kv& kv) {
#pragma unroll
  for (int j = 0; j < S::kKeys; ++j) {
    float x[S::kVec];
    kv.key(j).widen(x);
#pragma unroll
    for (int row = 0; row < S::kRows; ++row) {
      float s = x[0] * q[row][0];
#pragma unroll
      for (int i = 1; i < S::kVec; ++i) s += x[i] * q[row][i];
      dot[row * S::kKeys + j] = s;
    }
  }
}

// Adds its values, times their weights, to its part of the sums.
template <typename S, typename Kv>
__device__ inline void add_values(float (&sum)[S::kRows][S::kVec], const Shared<S>& shared, const Place<S>& at,
                                  const Kv& kv) {
  if (!at.active) return;
#pragma unroll
  for (int j = 0; j < S::kKeys; ++j) {
    float x[S::kVec];
    kv.value(j).widen(x);
#pragma unroll
    for (int row = 0; row < S::kRows; ++row) {
      const float weight = shared.weights[row][at.key_lane * S::kKeys + j];
#pragma unroll
      for (int i = 0; i < S::kVec; ++i) sum[row][i] += weight * x[i];
    }
  }
}

// Adds up what the threads have of the same elements, in a fixed order, to shared.sums.
template <typename S>
__device__ inline void store_sums(Shared<S>& shared, const Place<S>& at, float (&sum)[S::kRows][S::kVec]) {
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
}

// Whether a sum is not finite. Asked of shared memory, where no register of the walk is alive: before, they would
// spill.
template <typename S>
__device__ inline bool any_not_finite(const Shared<S>& shared, std::int64_t head_dim) {
  float zero = 0;  // NaN if so
#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
    for (int d = threadIdx.x; d < head_dim; d += S::kThreads) {
      zero += 0.0f * shared.sums[row][Shared<S>::sum_index(d)];
    }
  }
  return __syncthreads_or(zero != 0);
}

// Walks the keys end - 1 .. begin. On return shared.sums and shared.sticks hold what they take from whole sticks.
template <typename T, typename S, bool kKIsV>
__device__ void walk(Shared<S>& shared, const StickAttentionDecodeParams& p, const Group& group, bool aligned,
                     int begin, int end) {
  constexpr int kRounds = (S::kRows + S::kWarps - 1) / S::kWarps;
  const Place<S> at(p.head_dim);
  const int newest = newest_of_first_token(p, group);
  CachePipeline<T, S, kKIsV> kv(p, group, at, aligned, begin, end);
  float q[S::kRows][S::kVec] = {}, sum[S::kRows][S::kVec] = {};
#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
    if (row >= group.rows || !at.active) continue;
    Chunk<T>::load(group.query<T>(p, row) + at.d, aligned).widen(q[row]);
  }
  double stick[kRounds];  // of the rows this warp scans: warp, warp + kWarps..
#pragma unroll
  for (int i = 0; i < kRounds; ++i) stick[i] = 1;

  for (int first = end - at.tile();; first -= at.tile()) {
    kv.take(first);
    float dot[S::kRows * S::kKeys];
    dot_products<S>(dot, q, kv);
    kv.keys_read(first);
    sum_and_spread<S::kLanes, S::kRows * S::kKeys>(dot);
    store_scores<S>(shared, at, dot);
    __syncthreads();  // all scores are there
    bool done = true;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = at.warp + i * S::kWarps;
      if (row >= S::kRows) break;
      const int last = newest + static_cast<int>(group.token(p, row));
      scan_row(shared, p, group, at, row, first, begin, last, stick[i]);
      done = done && (row >= group.rows || exhausted(stick[i], p.stick_epsilon));
    }
    const bool all_done = __syncthreads_and(done);  // and all weights are there
    add_values(sum, shared, at, kv);
    if (all_done || first <= begin) break;
    kv.values_read();
  }

  store_sums(shared, at, sum);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (at.lane == 0 && at.warp + i * S::kWarps < S::kRows) shared.sticks[at.warp + i * S::kWarps] = stick[i];
  }
}

}  // namespace mfx::stick_decode
