// Backward: one task per sequence, K/V head and chunk of query tiles. Per query tile it walks the key tiles that
// forward visited, newest first, recomputing the scores:
//
//   S^T = K_tile Q^T,  dP^T = V_tile dO^T,  (weights, dS^T) = scan(S^T, dP^T),
//   dV_tile += weights dO,  dK_tile += dS^T Q,  dQ^T += K_tile^T dS^T,
//
// all five of the form row-major A times packed B. dK and dV accumulate in the task's own buffers (in one where K is
// V), in a fixed order: no atomics, the same bits for every number of threads. Where there are fewer heads than work
// for many threads, query tiles are split into a fixed number of chunks of about equal cost, whose buffers are then
// added up.
//
// Queries, keys and gradients of outputs that are not finite are added apart, to what they have to do with
// (stick_non_finite.hpp).
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/aligned_buffer.hpp"
#include "core/denormals.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "stick_attention/stick_non_finite.hpp"
#include "stick_attention/stick_scan.hpp"
#include "stick_attention/stick_tiles.hpp"

namespace mfx::MFX_ISA {
namespace {

constexpr std::int64_t kTasksWanted = 16;  // chunks make up for heads up to here, at most kMostChunks per head
constexpr std::int64_t kMostChunks = 8;

template <typename T, typename Op>
class StickBackward {
  using Real = Accumulate<T>;
  static constexpr bool kVnni = std::is_same_v<Op, BFloat16>;

 public:
  explicit StickBackward(const StickAttentionBackwardParams& params)
      : params_(params),
        p_(params.problem),
        g_(p_),
        padded_dim_(round_up(p_.head_dim, 16)),
        tile_grads_((params.grad_v == nullptr ? 1 : 2) * kTileKeys * padded_dim_),
        plan_(plan()),
        keys_(static_cast<std::int64_t>(packs_.size()) * kTileKeys * p_.head_dim),
        partial_grads_(plan_.partial_tiles * tile_grads_) {}

  void run() {
    parallel_tasks(static_cast<std::int64_t>(packs_.size()), [&](std::int64_t i) {
      const StickKeys<const T> k(p_.k, p_.k_strides, g_, packs_[i].sequence, packs_[i].head);
      packs_[i].keys_left_out = pack_finite_keys(k, packs_[i].tile * kTileKeys, p_.head_dim, packed(i));
      measure_values(packs_[i]);
    });
    parallel_tasks_with(
        static_cast<std::int64_t>(tasks_.size()),
        [&] { return Worker{g_.tile_rows, p_.head_dim, padded_dim_, plan_.most_tiles * tile_grads_}; },
        [&](std::int64_t i, Worker& worker) { accumulate(tasks_[i], worker); });
    parallel_tasks(static_cast<std::int64_t>(packs_.size()), [&](std::int64_t i) {
      if (!has_one_task(packs_[i])) write_grads(packs_[i]);
    });
  }

 private:
  struct Pack {
    std::int64_t sequence, head, tile, at;           // the at-th key tile of all
    std::uint64_t keys_left_out, values_not_finite;  // bits of keys
    Real v_norm_max;                                 // greatest length of its values that take part
  };
  struct Range {
    std::int64_t begin, end;
  };
  struct Task {
    std::int64_t sequence, head;
    Range rows;               // of queries
    std::int64_t first_pack;  // of this sequence and head
    Range tiles;              // key tiles that its query tiles visit
    std::int64_t partial;     // where its gradients begin in partial_grads_, in tiles
    Real* grads;              // per key tile dK [64, padded D], then dV; its worker's, where it is its head's only task
  };
  struct Plan {
    std::int64_t partial_tiles, most_tiles;  // in partial_grads_; of a task that is its head's only one
  };

  // Lists packed key tiles and tasks.
  Plan plan() {
    Plan sizes{0, 0};
    const std::int64_t heads = std::max<std::int64_t>(1, p_.sequences * p_.heads);
    const std::int64_t chunks = std::clamp<std::int64_t>(ceil_div(kTasksWanted, heads), 1, kMostChunks);
    for (std::int64_t i = 0; i < p_.sequences; ++i) {
      const StickSequence& s = g_.sequences[i];
      for (std::int64_t h = 0; h < p_.heads; ++h) {
        const std::int64_t first_pack = static_cast<std::int64_t>(packs_.size());
        for (std::int64_t t = 0; t < g_.key_tiles(s); ++t) packs_.push_back({i, h, t, first_pack + t, 0, 0, 0});
        const std::int64_t first_task = static_cast<std::int64_t>(tasks_.size());
        split(i, h, first_pack, chunks);
        const std::int64_t end_task = static_cast<std::int64_t>(tasks_.size());
        for (std::int64_t t = 0; t < g_.key_tiles(s); ++t) contributors_.push_back({first_task, end_task});
        for (std::int64_t t = first_task; t < end_task; ++t) {
          const std::int64_t tiles = tasks_[t].tiles.end - tasks_[t].tiles.begin;
          if (end_task - first_task == 1) {
            sizes.most_tiles = std::max(sizes.most_tiles, tiles);
          } else {
            tasks_[t].partial = sizes.partial_tiles;
            sizes.partial_tiles += tiles;
          }
        }
      }
    }
    return sizes;
  }

  // The key tiles that forward visited for the query tile that begins at `row`.
  Range visited(const StickQueryTile& tile) const {
    const std::int64_t end = StickSight(g_, tile).key_tiles();
    return {end == 0 ? 0 : std::min<std::int64_t>(params_.first_tiles[g_.flat_row(tile, tile.first_row)], end), end};
  }

  // Cuts a head's query tiles into chunks that visit about the same number of key tiles each.
  void split(std::int64_t sequence, std::int64_t head, std::int64_t first_pack, std::int64_t chunks) {
    const std::int64_t rows = g_.sequences[sequence].rows, m = g_.tile_rows;
    const auto cost_of = [](const Range& tiles) { return 1 + tiles.end - tiles.begin; };
    std::int64_t total = 0, cost = 0;
    for (std::int64_t row = 0; row < rows; row += m) total += cost_of(visited({sequence, head, row}));
    std::int64_t done = 0;
    for (std::int64_t row = 0; row < rows; row += m) {
      const Range tiles = visited({sequence, head, row});
      const std::int64_t chunk = cost * chunks / total;
      if (row == 0 || chunk > done) tasks_.push_back({sequence, head, {row, row}, first_pack, tiles, 0, nullptr});
      done = chunk;
      cost += cost_of(tiles);
      Task& task = tasks_.back();
      task.rows.end = std::min(row + m, rows);
      if (tiles.begin == tiles.end) continue;
      if (task.tiles.begin == task.tiles.end) task.tiles = tiles;
      task.tiles = {std::min(task.tiles.begin, tiles.begin), std::max(task.tiles.end, tiles.end)};
    }
  }

  Op* packed(std::int64_t at) { return keys_.data() + at * kTileKeys * p_.head_dim; }

  // Which of a tile's values are not finite, and how long the others are, of those that rows can see.
  void measure_values(Pack& pack) const {
    const StickKeys<const T> v(p_.v, p_.v_strides, g_, pack.sequence, pack.head);
    const std::int64_t first = pack.tile * kTileKeys, count = std::min(kTileKeys, v.count - first);
    pack.values_not_finite = non_finite_rows(count, p_.head_dim, [&](std::int64_t key) { return v[first + key]; });
    std::uint8_t bytes[kTileKeys];
    const std::uint8_t* keep;
    if (!StickKeep(g_, pack.sequence).tile(first, count, bytes, &keep)) return;
    for (std::int64_t j = 0; j < count; ++j) {
      if ((keep != nullptr && !keep[j]) || (pack.values_not_finite >> j & 1)) continue;
      Vec<Real> squares{};
      for_lanes<Real>(p_.head_dim, [&](std::int64_t d, int n) {
        const Vec<Real> x = load_lanes_of(v[first + j] + d, n);
        squares += x * x;
      });
      pack.v_norm_max = std::max(pack.v_norm_max, std::sqrt(reduce_add(squares)));
    }
  }

  // The memory of one thread, for tiles of m rows; of the tasks that it does alone the gradients, too.
  struct Worker {
    std::int64_t m, dim, padded, grads_size;
    ScopedFlushDenormals flush{};
    BrgemmScope scope{};
    ScratchArrays arrays{};
    Real* const grads = arrays.take<Real>(grads_size);
    Real* const scores = arrays.take<Real>(kTileKeys * m);
    Real* const grad_weights = arrays.take<Real>(kTileKeys * m);
    Real* const g = arrays.take<Real>(kTileKeys * m);
    Real* const grad_q = arrays.take<Real>(dim * m);
    Real* const rem = arrays.take<Real>(m);
    Real* const newest = arrays.take<Real>(m);
    Real* const delta = arrays.take<Real>(m);
    Real* const sum_g = arrays.take<Real>(m);
    Real* const dp_bound = arrays.take<Real>(m);
    Op* const q_columns = arrays.take<Op>(dim * m);
    Op* const grad_o_columns = arrays.take<Op>(dim * m);
    Op* const q_rows = arrays.take<Op>(padded * m);
    Op* const grad_o_rows = arrays.take<Op>(padded * m);
    Op* const weights = arrays.take<Op>(kTileKeys * m);
    Op* const grad_scores = arrays.take<Op>(kTileKeys * m);
    Op* const grad_scores_vnni = arrays.take<Op>(kTileKeys * m);
    Op* const key_scratch = arrays.take<Op>(kTileKeys * dim);
    Op* const value_scratch = arrays.take<Op>(kTileKeys * dim);
  };

  void accumulate(Task& task, Worker& worker) {
    const bool alone = has_one_task(packs_[task.first_pack]);
    task.grads = alone ? worker.grads : partial_grads_.data() + task.partial * tile_grads_;
    std::fill_n(task.grads, (task.tiles.end - task.tiles.begin) * tile_grads_, Real(0));
    Real v_norm_max = 0;
    for (std::int64_t t = task.tiles.begin; t < task.tiles.end; ++t) {
      v_norm_max = std::max(v_norm_max, packs_[task.first_pack + t].v_norm_max);
    }
    for (std::int64_t row = task.rows.begin; row < task.rows.end; row += g_.tile_rows) {
      walk(task, {task.sequence, task.head, row}, v_norm_max, worker);
    }
    if (!alone) return;
    const std::int64_t tiles = g_.key_tiles(g_.sequences[task.sequence]);
    for (std::int64_t t = 0; t < tiles; ++t) write_grads(packs_[task.first_pack + t]);
  }

  void walk(const Task& task, const StickQueryTile& tile, Real v_norm_max, Worker& x) {
    const std::int64_t m = g_.tile_rows, dim = p_.head_dim, padded = padded_dim_;
    const StickRows<const T> q(p_.q, p_.q_strides, g_, tile);
    const StickRows<const T> grad_o(params_.grad_o, params_.grad_o_strides, g_, tile);
    const StickKeys<const T> k(p_.k, p_.k_strides, g_, tile.sequence, tile.head);
    const StickKeys<const T> v(p_.v, p_.v_strides, g_, tile.sequence, tile.head);
    StickSight sight(g_, tile);

    pack_rows_transposed(q, dim, m, x.q_columns);
    pack_rows_transposed(grad_o, dim, m, x.grad_o_columns);
    const std::uint64_t q_left_out = pack_finite_rows(q, dim, m, padded, x.q_rows);
    const std::uint64_t grad_o_left_out = pack_finite_rows(grad_o, dim, m, padded, x.grad_o_rows);
    start_rows(tile, grad_o, v_norm_max, x);

    const Range tiles = visited(tile);

    bool started = false;
    for (std::int64_t t = tiles.end; t-- > tiles.begin;) {
      if (!sight.turn_to(t)) continue;
      const std::int64_t first = sight.first, keys = sight.keys;
      const Pack& pack = packs_[task.first_pack + t];
      // Rows that are not there would multiply their zeros with what is not finite.
      const Real* const newest =
          sight.newest_keys(x.newest, !sight.all_rows_there() && (pack.keys_left_out | pack.values_not_finite) != 0);
      const OperandA<Op> key_rows = row_operand(k, first, keys, dim, x.key_scratch);
      const OperandA<Op> value_rows = row_operand(v, first, keys, dim, x.value_scratch);
      tile_gemm(keys, m, dim, key_rows.data, key_rows.ld, x.q_columns, m, x.scores, m, false);
      tile_gemm(keys, m, dim, value_rows.data, value_rows.ld, x.grad_o_columns, m, x.grad_weights, m, false);
      stick_scan_backward<Op, Real>({.tile = {.scores = x.scores,
                                              .rows = m,
                                              .keys = keys,
                                              .keep = sight.keep,
                                              .newest = newest,
                                              .scale = p_.scale,
                                              .rem = x.rem},
                                     .grad_scratch = x.grad_weights,
                                     .score_scratch = x.scores,
                                     .g = x.g,
                                     .delta = x.delta,
                                     .dp_bound = x.dp_bound,
                                     .sum_g = x.sum_g},
                                    x.weights, x.grad_scores, x.grad_scores_vnni);
      Real* const grad_k = task.grads + (t - task.tiles.begin) * tile_grads_;
      Real* const grad_v = params_.grad_v == nullptr ? grad_k : grad_k + kTileKeys * padded;
      gemm_columns(keys, padded, m, x.weights, m, x.grad_o_rows, grad_v);
      gemm_columns(keys, padded, m, x.grad_scores, m, x.q_rows, grad_k);
      tile_gemm(dim, m, keys, packed(task.first_pack + t), kTileKeys, kVnni ? x.grad_scores_vnni : x.grad_scores, m,
                x.grad_q, m, started);
      started = true;

      const auto sees = [&](std::int64_t row, std::int64_t key) { return sight.sees(row, key); };
      const auto add_rows = [&](std::uint64_t rows, const StickRows<const T>& from, const Op* factors, Real* grad) {
        add_non_finite(
            rows, [&](std::int64_t row) { return from[row]; }, keys, dim, sees,
            [&](std::int64_t row, std::int64_t key) { return factors[key * m + row]; },
            [&](std::int64_t key, std::int64_t d) -> Real& { return grad[key * padded + d]; });
      };
      add_rows(grad_o_left_out, grad_o, x.weights, grad_v);
      add_rows(q_left_out, q, x.grad_scores, grad_k);
      add_non_finite(
          pack.keys_left_out, [&](std::int64_t key) { return k[first + key]; }, q.count, dim,
          [&](std::int64_t key, std::int64_t row) { return sees(row, key); },
          [&](std::int64_t key, std::int64_t row) { return x.grad_scores[key * m + row]; },
          [&](std::int64_t row, std::int64_t d) -> Real& { return x.grad_q[d * m + row]; });
    }
    if (!started) std::fill_n(x.grad_q, dim * m, Real(0));
    const StickRows<T> grad_q(params_.grad_q, params_.grad_q_strides, g_, tile);
    transpose_words<Real>(
        dim, m, [&](std::int64_t d, std::int64_t row, int) { return load(x.grad_q + d * m + row); },
        [&](std::int64_t row, std::int64_t d, Vec<Real> values, int n) {
          if (row < grad_q.count) store_lanes_of(grad_q[row] + d, values, n);
        });
  }

  // The rows' state at the newest key, and delta = do . o + d_remainder * remainder, with o as it was before rounding.
  void start_rows(const StickQueryTile& tile, const StickRows<const T>& grad_o, Real v_norm_max, Worker& x) {
    const StickRows<const T> o(params_.o, params_.o_strides, g_, tile);
    const bool rounded = params_.residual != nullptr;
    const StickRows<const T> residual(rounded ? params_.residual : params_.o, params_.o_strides, g_, tile);
    const Real* const remainder = static_cast<const Real*>(params_.remainder);
    const Real* const grad_remainder = static_cast<const Real*>(params_.grad_remainder);
    for (std::int64_t row = 0; row < g_.tile_rows; ++row) {
      x.rem[row] = row < o.count ? 1 : 0;
      x.sum_g[row] = 0;
      x.delta[row] = 0;
      x.dp_bound[row] = 0;
      if (row >= o.count) continue;
      Vec<Real> sum{}, squares{};
      for_lanes<Real>(p_.head_dim, [&](std::int64_t d, int n) {
        Vec<Real> unrounded = load_lanes_of(o[row] + d, n);
        if (rounded) unrounded += load_lanes_of(residual[row] + d, n);
        const Vec<Real> grad = load_lanes_of(grad_o[row] + d, n);
        sum += grad * unrounded;
        squares += grad * grad;
      });
      const std::int64_t flat = g_.flat_row(tile, tile.first_row + row);
      x.delta[row] = reduce_add(sum);
      // 1.01 for the rounding of weights and of the lengths.
      x.dp_bound[row] = Real(1.01) * std::sqrt(reduce_add(squares)) * v_norm_max;
      if (grad_remainder != nullptr) {
        x.delta[row] += grad_remainder[flat] * remainder[flat];
        x.dp_bound[row] += Real(1.01) * std::abs(grad_remainder[flat]);
      }
      // Where lengths overflow, no bound: but 0 times it must be 0.
      constexpr Real most = std::numeric_limits<Real>::max();
      x.dp_bound[row] = x.dp_bound[row] < most ? x.dp_bound[row] : most;
    }
  }

  // Then its task writes its gradients itself, while they are in the cache.
  bool has_one_task(const Pack& pack) const { return contributors_[pack.at].end - contributors_[pack.at].begin == 1; }

  // Adds up one key tile's gradients over the tasks of its head that visited it, and writes them.
  void write_grads(const Pack& pack) {
    const Range tasks = contributors_[pack.at];
    for (const bool value : {false, true}) {
      if (value && params_.grad_v == nullptr) break;
      const StickKeys<T> grad(value ? params_.grad_v : params_.grad_k,
                              value ? params_.grad_v_strides : params_.grad_k_strides, g_, pack.sequence, pack.head);
      const std::int64_t first = pack.tile * kTileKeys;
      for (std::int64_t j = 0; j < std::min(kTileKeys, grad.count - first); ++j) {
        for_lanes<Real>(p_.head_dim, [&](std::int64_t d, int n) {
          Vec<Real> sum{};
          for (std::int64_t i = tasks.begin; i < tasks.end; ++i) {
            const Range tiles = tasks_[i].tiles;
            if (pack.tile < tiles.begin || pack.tile >= tiles.end) continue;
            const Real* part = tasks_[i].grads + (pack.tile - tiles.begin) * tile_grads_;
            sum += load_lanes_of(part + ((value ? kTileKeys : 0) + j) * padded_dim_ + d, n);
          }
          store_lanes_of(grad[first + j] + d, sum, n);
        });
      }
    }
  }

  const StickAttentionBackwardParams& params_;
  const StickAttentionProblem& p_;
  const StickGeometry g_;
  const std::int64_t padded_dim_;
  const std::int64_t tile_grads_;  // size of a key tile's dK and dV
  std::vector<Pack> packs_;        // every key tile of every sequence and head
  std::vector<Task> tasks_;
  std::vector<Range> contributors_;  // per key tile, the tasks of its head
  const Plan plan_;
  AlignedBuffer<Op> keys_;             // K^T tiles
  AlignedBuffer<Real> partial_grads_;  // of heads with several tasks
};

}  // namespace

void stick_attention_backward(const StickAttentionBackwardParams& params) {
  with_stick_types(params.problem.dtype, [&]<typename T, typename Op>() { StickBackward<T, Op>(params).run(); });
}

}  // namespace mfx::MFX_ISA
