// Forward: one task per query tile and K/V head. It walks the key tiles from the newest its rows see to the oldest and
// keeps O^T [D, rows] and the sticks. Per key tile:
//
//   S^T [keys, rows] = K_tile Q^T        K in place, Q^T packed once per task
//   weights          = scan(S^T)         stick_scan.hpp
//   O^T             += V_tile^T weights  V^T packed once for all tasks of a head, unless there are too few to share it
//
// Values that are not finite are added to the rows that see them, apart (stick_non_finite.hpp).
//
// Heads are worked on in rounds, as few at a time as keep all threads busy: packed V need not be there for all of them.
#include <algorithm>

#include "core/aligned_buffer.hpp"
#include "core/denormals.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "stick_attention/stick_exhausted.hpp"
#include "stick_attention/stick_non_finite.hpp"
#include "stick_attention/stick_scan.hpp"
#include "stick_attention/stick_tiles.hpp"

namespace mfx::MFX_ISA {
namespace {

constexpr std::int64_t kPackShared = 3;       // query tiles per head from which on packing all of V at once pays
constexpr std::int64_t kTilesPerThread = 16;  // in a round: the last of them, which threads wait for, are short

template <typename T, typename Op>
class StickForward {
  using Real = Accumulate<T>;

 public:
  explicit StickForward(const StickAttentionForwardParams& params)
      : params_(params),
        p_(params.problem),
        g_(p_),
        packed_tiles_(plan()),
        values_(packed_tiles_ * kTileKeys * p_.head_dim),
        left_out_(packed_tiles_) {}

  void run() {
    Round done = {};
    for (const Round& round : rounds_) {
      parallel_tasks(round.packs - done.packs, [&](std::int64_t i) { pack(packs_[done.packs + i]); });
      parallel_tasks_with(
          round.tiles - done.tiles, [&] { return Worker{g_.tile_rows, p_.head_dim}; },
          [&](std::int64_t i, Worker& worker) { walk(tiles_[done.tiles + i], worker); });
      done = round;
    }
  }

 private:
  struct Pack {
    std::int64_t sequence, head, tile;
  };
  // The memory of one thread, for tiles of m rows.
  struct Worker {
    std::int64_t m, dim;
    ScopedFlushDenormals flush{};
    BrgemmScope scope{};
    ScratchArrays arrays{};
    Real* const out = arrays.take<Real>(dim * m);  // O^T
    Real* const scores = arrays.take<Real>(kTileKeys * m);
    Real* const rem = arrays.take<Real>(m);
    Real* const newest = arrays.take<Real>(m);
    Op* const queries = arrays.take<Op>(dim * m);
    Op* const weights = arrays.take<Op>(kTileKeys * m);
    Op* const key_scratch = arrays.take<Op>(kTileKeys * dim);
    Op* const value_scratch = arrays.take<Op>(kTileKeys * dim);
  };
  struct PackedAt {
    std::int64_t first;  // of a head's packed tiles of V, or -1
  };
  struct PackedValues {
    const Op* data;
    std::uint64_t left_out;  // a bit for each key that is not finite
  };
  struct Round {
    std::int64_t packs, tiles;  // where it ends in the lists
  };

  // Lists the tasks, the large ones (late queries, long walks) of each head first; returns how many tiles of V are
  // packed at a time.
  std::int64_t plan() {
    const std::int64_t enough = kTilesPerThread * num_threads();
    std::int64_t size = 0, largest = 0;
    Round begin = {};
    for (std::int64_t i = 0; i < p_.sequences; ++i) {
      const StickSequence& s = g_.sequences[i];
      const std::int64_t query_tiles = ceil_div(s.rows, g_.tile_rows);
      for (std::int64_t h = 0; h < p_.heads; ++h) {
        if (std::ssize(tiles_) - begin.tiles >= enough) {
          begin = listed();
          rounds_.push_back(begin);
          size = 0;
        }
        for (std::int64_t t = query_tiles; t-- > 0;) tiles_.push_back({i, h, t * g_.tile_rows});
        packed_at_.push_back({query_tiles >= kPackShared ? size : -1});
        if (query_tiles < kPackShared) continue;
        for (std::int64_t t = 0; t < g_.key_tiles(s); ++t) packs_.push_back({i, h, t});
        size += g_.key_tiles(s);
        largest = std::max(largest, size);
      }
    }
    rounds_.push_back(listed());
    return largest;
  }
  Round listed() const { return {std::ssize(packs_), std::ssize(tiles_)}; }

  Op* packed(std::int64_t at) { return values_.data() + at * kTileKeys * p_.head_dim; }

  void pack(const Pack& t) {
    const StickKeys<const T> v(p_.v, p_.v_strides, g_, t.sequence, t.head);
    const std::int64_t at = packed_at_[t.sequence * p_.heads + t.head].first + t.tile;
    left_out_[at] = pack_finite_keys(v, t.tile * kTileKeys, p_.head_dim, packed(at));
  }

  PackedValues values(const StickKeys<const T>& v, const StickQueryTile& task, std::int64_t tile, Op* scratch) {
    const std::int64_t first = packed_at_[task.sequence * p_.heads + task.head].first;
    if (first >= 0) return {packed(first + tile), left_out_[first + tile]};
    return {scratch, pack_finite_keys(v, tile * kTileKeys, p_.head_dim, scratch)};
  }

  void walk(const StickQueryTile& task, Worker& x) {
    const std::int64_t m = g_.tile_rows, dim = p_.head_dim;
    const StickRows<const T> q(p_.q, p_.q_strides, g_, task);
    const StickKeys<const T> k(p_.k, p_.k_strides, g_, task.sequence, task.head);
    const StickKeys<const T> v(p_.v, p_.v_strides, g_, task.sequence, task.head);
    StickSight sight(g_, task);
    pack_rows_transposed(q, dim, m, x.queries);
    for (std::int64_t row = 0; row < m; ++row) x.rem[row] = row < q.count ? 1 : 0;
    const Real epsilon = static_cast<Real>(exit_epsilon(params_.stick_epsilon));

    bool started = false;
    std::int64_t first_tile = sight.key_tiles();
    while (first_tile > 0) {
      --first_tile;
      if (!sight.turn_to(first_tile)) continue;
      const std::int64_t first = sight.first, keys = sight.keys;
      const OperandA<Op> key_rows = row_operand(k, first, keys, dim, x.key_scratch);
      tile_gemm(keys, m, dim, key_rows.data, key_rows.ld, x.queries, m, x.scores, m, false);
      stick_scan_forward<Op, Real>({.scores = x.scores,
                                    .rows = m,
                                    .keys = keys,
                                    .keep = sight.keep,
                                    .newest = sight.newest_keys(x.newest),
                                    .scale = p_.scale,
                                    .rem = x.rem},
                                   x.weights);
      const PackedValues values = this->values(v, task, first_tile, x.value_scratch);
      tile_gemm(dim, m, keys, values.data, kTileKeys, x.weights, m, x.out, m, started);
      started = true;
      add_non_finite(
          values.left_out, [&](std::int64_t key) { return v[first + key]; }, q.count, dim,
          [&](std::int64_t key, std::int64_t row) { return sight.sees(row, key); },
          [&](std::int64_t key, std::int64_t row) {
            return std::is_same_v<Op, BFloat16> ? x.weights[(key / 2 * m + row) * 2 + key % 2]
                                                : x.weights[key * m + row];
          },
          [&](std::int64_t row, std::int64_t d) -> Real& { return x.out[d * m + row]; });
      if (std::all_of(x.rem, x.rem + m, [&](Real rem) { return exhausted(rem, epsilon); })) break;
    }
    if (!started) std::fill_n(x.out, dim * m, Real(0));
    finish(task, x.out, x.rem, first_tile);
  }

  // Writes o, what its rounding lost, the remainders and the note for backward.
  void finish(const StickQueryTile& task, const Real* out, const Real* rem, std::int64_t first_tile) {
    const std::int64_t m = g_.tile_rows;
    const bool leaves_residual = params_.residual != nullptr;
    const StickRows<T> o(params_.o, params_.o_strides, g_, task);
    const StickRows<T> residual(leaves_residual ? params_.residual : params_.o, params_.o_strides, g_, task);
    transpose_words<Real>(
        p_.head_dim, m, [&](std::int64_t d, std::int64_t row, int) { return load(out + d * m + row); },
        [&](std::int64_t row, std::int64_t d, Vec<Real> values, int n) {
          if (row >= o.count) return;
          store_lanes_of(o[row] + d, values, n);
          if constexpr (!std::is_same_v<T, Real>) {
            if (leaves_residual) store_lanes_of(residual[row] + d, values - load_lanes_of(o[row] + d, n), n);
          }
        });
    for (std::int64_t row = 0; row < o.count; ++row) {
      const std::int64_t flat = g_.flat_row(task, task.first_row + row);
      static_cast<Real*>(params_.remainder)[flat] = rem[row];
      params_.first_tiles[flat] = static_cast<std::int32_t>(first_tile);
    }
  }

  const StickAttentionForwardParams& params_;
  const StickAttentionProblem& p_;
  const StickGeometry g_;
  std::vector<StickQueryTile> tiles_;
  std::vector<Pack> packs_;
  std::vector<Round> rounds_;
  std::vector<PackedAt> packed_at_;  // [sequence, head]
  const std::int64_t packed_tiles_;
  AlignedBuffer<Op> values_;               // V^T tiles
  AlignedBuffer<std::uint64_t> left_out_;  // of each of them
};

}  // namespace

void stick_attention_forward(const StickAttentionForwardParams& params) {
  with_stick_types(params.problem.dtype, [&]<typename T, typename Op>() { StickForward<T, Op>(params).run(); });
}

}  // namespace mfx::MFX_ISA
