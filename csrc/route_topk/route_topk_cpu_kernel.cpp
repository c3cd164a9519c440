// One pass over tiles of kTileTokens tokens: x tile -> hidden tile -> activation -> logits tile -> softmax, ranking
// and sums. A tile stays in cache from x to the results; sums over tokens are kept per tile and added in order.
#include <algorithm>

#include "core/aligned_buffer.hpp"
#include "core/gelu.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"
#include "core/tile_gemm.hpp"
#include "route_topk/route_topk_activation.hpp"
#include "route_topk/route_topk_pack.hpp"
#include "route_topk/route_topk_select.hpp"

namespace mfx::MFX_ISA {
namespace {

// Per tile: [0, E) sum of p, then the sums of p log p and of logsumexp^2.
template <typename A>
class TileSums {
 public:
  TileSums(std::int64_t tiles, std::int64_t num_experts)
      : tiles_(tiles), experts_(num_experts), sums_(tiles * (num_experts + 2)), counts_(tiles * num_experts) {}

  A* sums(std::int64_t tile) { return sums_.data() + tile * (experts_ + 2); }
  std::int32_t* counts(std::int64_t tile) { return counts_.data() + tile * experts_; }

  void write(const RouteTopKParams& p) {
    const auto total = [&](std::int64_t column) {
      double sum = 0;
      for (std::int64_t tile = 0; tile < tiles_; ++tile) sum += sums(tile)[column];
      return static_cast<A>(sum);
    };
    for (std::int64_t e = 0; e < experts_; ++e) {
      static_cast<A*>(p.prob_sum)[e] = total(e);
      std::int32_t count = 0;
      for (std::int64_t tile = 0; tile < tiles_; ++tile) count += counts(tile)[e];
      p.counts[e] = count;
    }
    *static_cast<A*>(p.plogp_sum) = total(experts_);
    *static_cast<A*>(p.logsumexp_sq_sum) = total(experts_ + 1);
  }

 private:
  std::int64_t tiles_, experts_;
  AlignedBuffer<A> sums_;
  AlignedBuffer<std::int32_t> counts_;
};

template <typename A>
class Selector {
  static constexpr int w = kWidth<A>;

 public:
  explicit Selector(const RouteTopKParams& p)
      : p_(p),
        experts_(p.network.num_experts),
        logits_(experts_),
        probs_(experts_),
        noise_(p.num_sampled > 0 ? experts_ : 0),
        scores_(p.ranking.by_score() ? experts_ : 0),
        prob_sums_(experts_),
        keys_(experts_),
        groups_(p.ranking, experts_),
        gates_(p.k),
        slopes_(p.k),
        ids_(p.k * w) {}

  // rows [count][>= E] of logits, of the tokens from `first` on.
  void tile(std::int64_t first, std::int64_t count, const A* rows, std::int64_t ld, A* sums, std::int32_t* counts) {
    Vec<A> plogp_sum = {}, square_sum = {};
    std::fill_n(prob_sums_.data(), experts_, Vec<A>{});
    std::fill_n(counts, experts_, 0);
    for (std::int64_t token = 0; token < count; token += w) {
      const int present = static_cast<int>(std::min<std::int64_t>(w, count - token));
      load_lanes(rows + token * ld, ld, present, experts_, logits_.data());
      const LogPartition<A> partition = softmax_lanes<A>(experts_, logits_.data(), probs_.data());
      const Vec<KeyOf<A>> counted = present_lanes(present);
      for (std::int64_t e = 0; e < experts_; ++e) {
        prob_sums_[e] += counted ? probs_[e] : Vec<A>{};
        const Vec<A> plogp = probs_[e] * log_prob(logits_[e], probs_[e], partition);
        plogp_sum += counted ? plogp : Vec<A>{};
      }
      const Vec<A> logsumexp = partition.largest + partition.log_sum;
      square_sum += counted ? logsumexp * logsumexp : Vec<A>{};
      choose(first + token, present);
      write(first + token, present, counts);
    }
    for (std::int64_t e = 0; e < experts_; ++e) sums[e] = reduce_add(prob_sums_[e]);
    sums[experts_] = reduce_add(plogp_sum);
    sums[experts_ + 1] = reduce_add(square_sum);
  }

 private:
  static Vec<KeyOf<A>> present_lanes(int present) {
    Vec<KeyOf<A>> mask;
    for (int i = 0; i < w; ++i) mask[i] = i < present ? -1 : 0;
    return mask;
  }

  void choose(std::int64_t token, int present) {
    const std::int64_t best = p_.k - p_.num_sampled;
    if (p_.ranking.by_score()) {
      rank_scores();
    } else {
      for (std::int64_t e = 0; e < experts_; ++e) keys_[e] = rank_key<A>(logits_[e]);
    }
    if (best > 0) largest_keys<A>(experts_, keys_.data(), best, ids_.data());
    if (p_.num_sampled > 0) {
      const A* noise = static_cast<const A*>(p_.noise) + token * experts_;
      load_lanes(noise, experts_, present, experts_, noise_.data());
      for (std::int64_t e = 0; e < experts_; ++e) {
        keys_[e] = rank_key<A>((probs_[e] + static_cast<A>(kRouterSamplingFloor)) / noise_[e]);
      }
      for (std::int64_t j = 0; j < best; ++j) {  // below every key: not to be chosen again
        for (int i = 0; i < w; ++i) keys_[ids_[j * w + i]][i] = std::numeric_limits<KeyOf<A>>::min();
      }
      largest_keys<A>(experts_, keys_.data(), p_.num_sampled, ids_.data() + best * w);
    }
    ChosenGates<A>{gates_.data(), slopes_.data()}.compute(p_.order, logits_.data(), probs_.data(), p_.k, ids_.data());
    for (std::int64_t j = 0; j < p_.k; ++j) gates_[j] *= static_cast<A>(p_.scale);
  }

  void rank_scores() {
    const A* bias = static_cast<const A*>(p_.ranking.bias);
    for (std::int64_t e = 0; e < experts_; ++e) {
      scores_[e] = scores_are_sigmoids(p_.order) ? sigmoid_lanes<A>(logits_[e]).value : probs_[e];
      if (bias != nullptr) scores_[e] += bias[e];
      keys_[e] = rank_key<A>(scores_[e]);
    }
    groups_.apply(scores_.data(), keys_.data());
  }

  void write(std::int64_t token, int present, std::int32_t* counts) {
    for (int i = 0; i < present; ++i) {
      A* gates = static_cast<A*>(p_.gates) + (token + i) * p_.k;
      std::int32_t* ids = p_.expert_ids + (token + i) * p_.k;
      for (std::int64_t j = 0; j < p_.k; ++j) {
        gates[j] = gates_[j][i];
        ids[j] = ids_[j * w + i];
        ++counts[ids[j]];
      }
    }
  }

  const RouteTopKParams& p_;
  std::int64_t experts_;
  AlignedBuffer<Vec<A>> logits_, probs_, noise_, scores_, prob_sums_;
  AlignedBuffer<Vec<KeyOf<A>>> keys_;
  GroupFilter<A> groups_;
  AlignedBuffer<Vec<A>> gates_, slopes_;
  AlignedBuffer<std::int32_t> ids_;
};

// One tile without packed weights.
template <typename A>
void forward_few(const RouteTopKParams& p) {
  const RouterGateParams& n = p.network;
  AlignedBuffer<A> copy(n.num_tokens * n.dim), hidden(n.num_tokens * n.hidden_dim);
  const A* const x = operand_rows(n, 0, n.num_tokens, copy.data());
  A* logits = static_cast<A*>(p.logits);
  if (n.gate == RouterGate::kLinear) {
    multiply_few(n.num_tokens, x, expert_rows(n), logits, n.num_experts);
  } else {
    multiply_few(n.num_tokens, x, hidden_rows(n), hidden.data(), n.hidden_dim);
    activate(n, n.num_tokens, hidden.data(), n.hidden_dim, static_cast<A*>(p.hidden));
    multiply_few(n.num_tokens, hidden.data(), expert_rows(n), logits, n.num_experts);
  }
  TileSums<A> sums(1, n.num_experts);
  Selector<A>(p).tile(0, n.num_tokens, logits, n.num_experts, sums.sums(0), sums.counts(0));
  sums.write(p);
}

template <typename Op>
void forward(const RouteTopKParams& p) {
  using A = Accumulate<Op>;
  const RouterGateParams& n = p.network;
  const bool hidden_layer = has_hidden_layer(n.gate);
  const std::int64_t tiles = ceil_div(n.num_tokens, kTileTokens);
  TileSums<A> sums(tiles, n.num_experts);

  PackedB<Op> into_x(n.gate == RouterGate::kLogits ? 0 : n.dim, hidden_layer ? n.hidden_dim : n.num_experts);
  PackedB<A> into_hidden(hidden_layer ? n.hidden_dim : 0, n.num_experts);
  if (hidden_layer) {
    into_x.pack_transposed(hidden_rows(n));
    into_hidden.pack_transposed(expert_rows(n));
  } else if (n.gate == RouterGate::kLinear) {
    into_x.pack_transposed(expert_rows(n));
  }

  parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    const BrgemmScope scope;
    Scratch<Op> x(n.x_dtype == kDTypeOf<Op> ? 0 : kTileTokens * n.dim);
    Scratch<A> hidden(kTileTokens * into_x.padded()), logits(kTileTokens * into_hidden.padded());
    Selector<A> selector(p);
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first = tile * kTileTokens, count = std::min(kTileTokens, n.num_tokens - first);
      const Op* rows = operand_rows(n, first, count, x.data());
      const A* tile_logits = nullptr;
      std::int64_t ld = 0;
      if (n.gate == RouterGate::kLogits) {
        if constexpr (std::is_same_v<Op, A>) tile_logits = rows;
        ld = n.dim;
      } else {
        ld = into_x.padded();
        into_x.multiply(count, rows, n.dim, hidden.data(), ld);
        tile_logits = hidden.data();
      }
      if (hidden_layer) {
        A* saved = p.hidden == nullptr ? nullptr : static_cast<A*>(p.hidden) + first * n.hidden_dim;
        activate(n, count, hidden.data(), ld, saved);
        into_hidden.multiply(count, hidden.data(), ld, logits.data(), into_hidden.padded());
        tile_logits = logits.data();
        ld = into_hidden.padded();
      }
      A* const to = static_cast<A*>(p.logits) + first * n.num_experts;
      for (std::int64_t i = 0; i < count; ++i) convert(tile_logits + i * ld, n.num_experts, to + i * n.num_experts);
      selector.tile(first, count, tile_logits, ld, sums.sums(tile), sums.counts(tile));
    }
  });
  sums.write(p);
}

}  // namespace

Status route_topk(const RouteTopKParams& p) {
  const RouterGateParams& n = p.network;
  if (n.gate != RouterGate::kLogits && are_few(n)) {
    n.x_dtype == DType::kFloat64 ? forward_few<double>(p) : forward_few<float>(p);
  } else {
    with_operand(n, [&](auto operand) { forward<decltype(operand)>(p); });
  }
  return {};
}

}  // namespace mfx::MFX_ISA
