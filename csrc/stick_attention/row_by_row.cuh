// What a row does not see cannot reach it. The products of the tiled kernels multiply what is there with a weight of 0
// instead, which NaN and infinity survive: rows (of keys, in the dK/dV kernel) whose results are not finite are
// computed anew here, over the pairs that see each other alone. Slow, and only for what is within a tile of something
// that is not finite, or sees it.
//
// A warp works on a row, its lanes on the head dimension. Results go to columns [first_column, first_column +
// kColumns).
#pragma once

#include "stick_attention/backward.cuh"

namespace mfx::stick {

// Calls each(row) for every bit of `rows` that is set, when all lanes have written what they had to.
template <typename Each>
__device__ inline void row_by_row(std::uint32_t rows, Each&& each) {
  __syncwarp();
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) each(__ffs(static_cast<int>(rows)) - 1);
}

// A weight as the products of the tiled kernels take it.
template <typename Op>
__device__ inline float rounded_weight(float weight) {
  constexpr float kUnit = kWeightUnit<Op>;
  return rounded_pair(operand_pair<Op>(weight * kUnit, 0.0f)).x * (1.0f / kUnit);
}

// This lane's columns of a row.
template <int kColumns>
struct LaneColumns {
  int first, end;
  float sum[kColumns / 32] = {};

  __device__ LaneColumns(const StickAttentionProblem& p, int first_column)
      : first(first_column + static_cast<int>(threadIdx.x & 31)), end(static_cast<int>(p.head_dim)) {}

  // Calls each(column, sum of the column).
  template <typename Each>
  __device__ void each(Each&& each) {
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) {
      if (first + 32 * i < end) each(first + 32 * i, sum[i]);
    }
  }
  template <typename T>
  __device__ void add(float factor, const T* row) {
    each([&](int column, float& x) { x += factor * device::to_float(row[column]); });
  }
};

// The keys of a block's sequence and head.
template <typename T>
struct VisibleKeys {
  const StickAttentionProblem& p;
  const bool* mask;
  const T *k, *v;
  Beta beta_of;

  __device__ VisibleKeys(const StickAttentionProblem& p, const Sequence& s, std::int64_t head, float factor)
      : p(p),
        mask(p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + s.batch * p.tokens_k),
        k(kv_pointer<const T>(p.k, p.k_strides, s, head)),
        v(kv_pointer<const T>(p.v, p.v_strides, s, head)),
        beta_of{-factor} {}

  __device__ bool kept(int key) const { return mask == nullptr || mask[key]; }
  __device__ const T* value(int key) const { return v + key * p.v_strides.token; }
  __device__ float beta(const T* q, int key) const { return beta_of(dot(q, k + key * p.k_strides.token)); }

  // The inner product of two rows, in all lanes.
  __device__ float dot(const T* x, const T* y) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < p.head_dim; i += 32) sum += device::to_float(x[i]) * device::to_float(y[i]);
    return device::lanes_sum(sum);
  }
};

// o and its residual. The walk ends at `oldest_key`, as that of the row's tile did.
template <typename Op, int kColumns>
__device__ inline void forward_row(const StickAttentionForwardParams& params, float factor, const BlockInfo& tile,
                                   int row, int oldest_key, int first_column) {
  using T = typename Storage<Op>::Type;
  const StickAttentionProblem& p = params.problem;
  const Sequence& s = tile.s;
  if (row >= s.rows) return;
  const T* const q = QRows<const T>(p.q, p.q_strides, p, s, tile.head, row).at(0);
  const VisibleKeys<T> keys(p, s, tile.head, factor);
  LaneColumns<kColumns> o(p, first_column);
  double rest = 1.0;
  for (int key = s.newest_key(p, row); key >= oldest_key; --key) {
    if (!keys.kept(key)) continue;
    const double weight = rest * keys.beta(q, key);
    rest -= weight;
    o.add(rounded_weight<Op>(static_cast<float>(weight)), keys.value(key));
  }
  T* const to = QRows<T>(params.o, params.o_strides, p, s, tile.head, row).at(0);
  T* const residual =
      params.residual == nullptr ? nullptr : QRows<T>(params.residual, params.o_strides, p, s, tile.head, row).at(0);
  o.each([&](int column, float x) {
    to[column] = device::from_float<T>(x);
    if (residual != nullptr) residual[column] = device::from_float<T>(x - device::to_float(to[column]));
  });
}

// The runs of keys that have a state each: kRuns in every kSpan keys or, of 16 rows that see but a part of these,
// in the oldest half or quarter of them.
template <int kSpan, int kRuns>
struct RunsOf {
  const BackwardLaunch& launch;
  const Sequence& s;
  std::int64_t head;

  struct Run {
    int first, end;  // keys
    RunState* state;
  };
  // The run that has `key`, for a row that sees it.
  __device__ Run operator()(int row, int key) const {
    const StickAttentionProblem& p = launch.params.problem;
    const int span = key / kSpan * kSpan, last_row = min(row | 15, s.rows - 1);
    const int taken = kRuns > 1 ? visible_width_keys<kSpan>(s.newest_key(p, last_row) - span) : kSpan;
    const int length = taken / kRuns, run = (key - span) / length;
    const std::int64_t at =
        (span - launch.chunk_begin) / kSpan * (p.heads * launch.rows) + workspace_row(launch, s, head, row);
    return {span + run * length, span + (run + 1) * length, launch.run_states + at * kRuns + run};
  }
};

// dq of a row in this K/V chunk, its run states, and what it hands over to the next one. Two walks from the newest
// key on, for sums of older G as differences of one sum in binary64: delta, from an o that was rounded, is another.
template <typename Op, int kColumns, int kSpan, int kRuns>
__device__ inline void backward_dq_row(const BackwardLaunch& launch, const BlockInfo& tile, const ChunkWalk& walk,
                                       int row, int first_column) {
  using T = typename Storage<Op>::Type;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  const Sequence& s = tile.s;
  if (row >= s.rows) return;
  const T* const q = QRows<const T>(p.q, p.q_strides, p, s, tile.head, row).at(0);
  const T* const grad_o = QRows<const T>(params.grad_o, params.grad_o_strides, p, s, tile.head, row).at(0);
  const VisibleKeys<T> keys(p, s, tile.head, launch.factor);
  const RunsOf<kSpan, kRuns> runs{launch, s, tile.head};
  const std::int64_t at = workspace_row(launch, s, tile.head, row);
  LaneColumns<kColumns> grad_q(p, first_column);
  float* const sums = launch.sums + at * p.head_dim;
  const bool owner = first_column == 0 && (threadIdx.x & 31) == 0;  // of what there is once per row
  if (!walk.starts) grad_q.each([&](int column, float& x) { x = sums[column]; });
  // What follows is written over what all lanes (of head dims above 256, all warps) have read or written.
  if constexpr (kRuns == 1) __syncthreads();
  __syncwarp();

  const int newest = s.newest_key(p, row);
  double rem = 1.0, sum_g = 0.0;  // after the keys that were taken
  const auto take = [&](int key) {
    const float beta = keys.beta(q, key);
    const double weight = rem * beta;
    rem -= weight;
    sum_g += rounded_weight<Op>(static_cast<float>(weight)) * keys.dot(grad_o, keys.value(key));
    return beta;
  };
  const auto take_all = [&](int begin) {
    rem = 1.0;
    sum_g = 0.0;
    for (int key = newest; key >= begin; --key) {
      if (keys.kept(key)) take(key);
    }
  };
  take_all(first_visited_key(launch, s, tile.head, tile.first_row));
  double all = sum_g;
  if (params.grad_remainder != nullptr) {
    all += static_cast<const float*>(params.grad_remainder)[flat_row(p, s, tile.head, row)] * rem;
  }
  take_all(walk.end);
  for (int key = min(newest, walk.end - 1); key >= walk.begin;) {
    const auto run = runs(row, key);
    const auto newer_edge = static_cast<float>(rem);
    for (; key >= run.first; --key) {
      if (!keys.kept(key)) continue;
      const double older = all - sum_g, newer = sum_g;  // from this key to the oldest
      const float beta = take(key);
      grad_q.add(static_cast<float>(sum_g - newer - beta * older), keys.k + key * p.k_strides.token);
    }
    if (owner) *run.state = RunState{newer_edge, static_cast<float>(all - sum_g)};
  }
  T* const to = QRows<T>(params.grad_q, params.grad_q_strides, p, s, tile.head, row).at(0);
  grad_q.each([&](int column, float x) {
    if (walk.finishes) {
      to[column] = device::from_float<T>(x * launch.scale);
    } else {
      sums[column] = x;
    }
  });
  if (owner && !walk.finishes) launch.states[at] = {static_cast<float>(rem), static_cast<float>(sum_g)};
}

// dk and dv of a key, or, where K is V, their sum.
template <typename Op, int kColumns, int kSpan, int kRuns>
__device__ inline void backward_dkv_row(const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int key,
                                        int first_column) {
  using T = typename Storage<Op>::Type;
  const StickAttentionBackwardParams& params = launch.params;
  const StickAttentionProblem& p = params.problem;
  if (key >= s.keys) return;
  const VisibleKeys<T> keys(p, s, head, launch.factor);
  const QRows<const T> q(p.q, p.q_strides, p, s, head, 0);
  const QRows<const T> grad_o(params.grad_o, params.grad_o_strides, p, s, head, 0);
  const RunsOf<kSpan, kRuns> runs{launch, s, head};
  LaneColumns<kColumns> grad_k(p, first_column), grad_v(p, first_column);
  for (int row = keys.kept(key) ? max(s.first_row(p, key), 0) : s.rows; row < s.rows; ++row) {
    if (first_visited_key(launch, s, head, row) > key) continue;
    const T *const q_row = q.at(row), *const grad_row = grad_o.at(row);
    const auto run = runs(row, key);
    float rest = run.state->rem, older = run.state->older, beta = 0.0f, weight = 0.0f, g = 0.0f;
    // From the run's newest key that the row sees on; those older than the key add to `older` alone.
    for (int i = min(run.end - 1, s.newest_key(p, row)); i >= run.first; --i) {
      if (!keys.kept(i)) continue;
      const float beta_of_i = keys.beta(q_row, i), weight_of_i = beta_of_i * rest;
      rest -= weight_of_i;
      if (i > key) continue;
      const float g_of_i = weight_of_i * keys.dot(grad_row, keys.value(i));
      older += g_of_i;  // from here to the oldest key, at the end
      if (i < key) continue;
      beta = beta_of_i;
      weight = weight_of_i;
      g = g_of_i;
    }
    grad_v.add(rounded_weight<Op>(weight), grad_row);
    grad_k.add(g - beta * older, q_row);
  }
  T* const to_k = kv_pointer<T>(params.grad_k, params.grad_k_strides, s, head, key);
  const bool both = params.grad_v == nullptr;
  T* const to_v = both ? nullptr : kv_pointer<T>(params.grad_v, params.grad_v_strides, s, head, key);
#pragma unroll
  for (int i = 0; i < kColumns / 32; ++i) grad_k.sum[i] = grad_k.sum[i] * launch.scale + (both ? grad_v.sum[i] : 0.0f);
  grad_k.each([&](int column, float x) { to_k[column] = device::from_float<T>(x); });
  if (!both) grad_v.each([&](int column, float x) { to_v[column] = device::from_float<T>(x); });
}

}  // namespace mfx::stick
