// Softmax, ranking and their derivative for a group of tokens, one token per vector lane: lane i of element e of an
// array belongs to token i and expert e. No step crosses lanes, so small E costs no more than its arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "core/simd.hpp"
#include "moduleformer_ext/route_topk.hpp"

namespace mfx::MFX_ISA {

template <typename A>
using KeyOf = std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t>;

// rows [count <= lanes][num_experts] -> lanes[e]; the lanes of absent tokens are zero.
template <typename A>
inline void load_lanes(const A* rows, std::int64_t ld, int count, std::int64_t num_experts, Vec<A>* lanes) {
  constexpr int w = kWidth<A>;
  for (std::int64_t e = 0; e < num_experts; e += w) {
    const int valid = static_cast<int>(std::min<std::int64_t>(w, num_experts - e));
    Vec<A> block[w] = {};
    for (int i = 0; i < count; ++i) {
      block[i] = valid == w ? load(rows + i * ld + e) : load_partial(rows + i * ld + e, valid);
    }
    transpose<A>(block);
    for (int j = 0; j < valid; ++j) lanes[e + j] = block[j];
  }
}

// The inverse. Columns up to the next multiple of the vector width are written (as zeros), so ld must have room.
template <typename A>
inline void store_lanes(const Vec<A>* lanes, std::int64_t num_experts, int count, A* rows, std::int64_t ld) {
  constexpr int w = kWidth<A>;
  for (std::int64_t e = 0; e < num_experts; e += w) {
    const int valid = static_cast<int>(std::min<std::int64_t>(w, num_experts - e));
    Vec<A> block[w] = {};
    for (int j = 0; j < valid; ++j) block[j] = lanes[e + j];
    transpose<A>(block);
    for (int i = 0; i < count; ++i) store(rows + i * ld + e, block[i]);
  }
}

template <typename A>
struct LogPartition {
  Vec<A> largest, log_sum;  // logsumexp = largest + log_sum, kept apart so that log p does not lose digits
};

// probs[e] = p(e | token).
template <typename A>
inline LogPartition<A> softmax_lanes(std::int64_t num_experts, const Vec<A>* logits, Vec<A>* probs) {
  Vec<A> largest = logits[0], sum = {};
  for (std::int64_t e = 1; e < num_experts; ++e) largest = max(logits[e], largest);
  for (std::int64_t e = 0; e < num_experts; ++e) {
    probs[e] = exp(logits[e] - largest);
    sum += probs[e];
  }
  const Vec<A> inverse = A{1} / sum;
  for (std::int64_t e = 0; e < num_experts; ++e) probs[e] *= inverse;
  Vec<A> log_sum;
  for (int i = 0; i < kWidth<A>; ++i) log_sum[i] = std::log(sum[i]);
  return {largest, log_sum};
}

// log p, and 0 where p is 0 so that p log p is 0 there even for a logit of -infinity.
template <typename A>
inline Vec<A> log_prob(Vec<A> logit, Vec<A> prob, const LogPartition<A>& partition) {
  return prob == A{0} ? Vec<A>{} : (logit - partition.largest) - partition.log_sum;
}

// Integers in the order of the values, the two zeros equal, NaN above everything; all are above the least integer.
template <typename A>
inline Vec<KeyOf<A>> rank_key(Vec<A> value) {
  using Key = KeyOf<A>;
  constexpr Key kMagnitude = std::numeric_limits<Key>::max();
  const Vec<Key> bits = reinterpret_cast<Vec<Key>>(value + A{0});
  const Vec<Key> ordered = bits ^ ((bits >> (8 * sizeof(A) - 1)) & kMagnitude);
  return value == value ? ordered : Vec<Key>{} + kMagnitude;
}

inline constexpr std::int64_t kMaxInsertion = 16;

// ids [k][lanes]: the k experts of the largest keys above the least integer, in order, the lower index first among
// equals. A few are kept sorted in registers or L1 while the experts pass by; many are sorted lane by lane.
template <typename A>
inline void largest_keys(std::int64_t num_experts, const Vec<KeyOf<A>>* keys, std::int64_t k, std::int32_t* ids) {
  using Key = KeyOf<A>;
  using VecK = Vec<Key>;
  constexpr int w = kWidth<A>;
  if (k <= kMaxInsertion) {
    VecK best[kMaxInsertion], index[kMaxInsertion];
    for (std::int64_t j = 0; j < k; ++j) {
      best[j] = VecK{} + std::numeric_limits<Key>::min();
      index[j] = VecK{};
    }
    for (std::int64_t e = 0; e < num_experts; ++e) {
      VecK key = keys[e], id = VecK{} + static_cast<Key>(e), shifted = {};
      for (std::int64_t j = 0; j < k; ++j) {
        shifted |= key > best[j];  // from the place of insertion on, everything moves down by one
        const VecK old_best = best[j], old_index = index[j];
        best[j] = shifted ? key : old_best;
        index[j] = shifted ? id : old_index;
        key = shifted ? old_best : key;
        id = shifted ? old_index : id;
      }
    }
    for (std::int64_t j = 0; j < k; ++j) {
      for (int i = 0; i < w; ++i) ids[j * w + i] = static_cast<std::int32_t>(index[j][i]);
    }
    return;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(num_experts));
  std::vector<Key> column(static_cast<std::size_t>(num_experts));
  for (int i = 0; i < w; ++i) {
    for (std::int64_t e = 0; e < num_experts; ++e) {
      order[e] = static_cast<std::int32_t>(e);
      column[e] = keys[e][i];
    }
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](std::int32_t a, std::int32_t b) {
      return column[a] != column[b] ? column[a] > column[b] : a < b;
    });
    for (std::int64_t j = 0; j < k; ++j) ids[j * w + i] = order[j];
  }
}

// values[id of choice j][lane] for every lane.
template <typename A>
inline Vec<A> gather_choice(const Vec<A>* values, const std::int32_t* ids) {
  Vec<A> chosen;
  for (int i = 0; i < kWidth<A>; ++i) chosen[i] = values[ids[i]][i];
  return chosen;
}

template <typename A>
struct Sigmoid {
  Vec<A> value, slope;
};

// No digits are lost in either tail.
template <typename A>
inline Sigmoid<A> sigmoid_lanes(Vec<A> x) {
  const Vec<A> small = exp(x < 0 ? x : -x), share = 1 / (1 + small);
  return {(x < 0 ? small : broadcast(A{1})) * share, small * share * share};
}

// What the gates of k choices are made of, before they are scaled: gates [k][lanes], and by how much gate j grows with
// its own logit, slopes [k][lanes]. Where gates share a sum (all but kSigmoidTopK), what a logit does to them all is
// slope (d gate - sum over the choices of gate d gate).
template <typename A>
struct ChosenGates {
  Vec<A>*gates, *slopes;

  // ids [k][lanes]. Of kSoftmaxTopK, gates are probs.
  void compute(RouterOrder order, const Vec<A>* logits, const Vec<A>* probs, std::int64_t k, const std::int32_t* ids) {
    const auto chosen = [&](const Vec<A>* values, std::int64_t j) {
      return gather_choice<A>(values, ids + j * kWidth<A>);
    };
    if (order == RouterOrder::kSoftmaxTopK) {
      for (std::int64_t j = 0; j < k; ++j) gates[j] = chosen(probs, j);
      return;
    }
    Vec<A> sum = {};
    if (order == RouterOrder::kTopKSoftmax) {
      Vec<A> largest = chosen(logits, 0);
      for (std::int64_t j = 1; j < k; ++j) largest = max(chosen(logits, j), largest);
      for (std::int64_t j = 0; j < k; ++j) {
        gates[j] = slopes[j] = exp(chosen(logits, j) - largest);
        sum += gates[j];
      }
    } else {
      for (std::int64_t j = 0; j < k; ++j) {
        const Sigmoid<A> sigmoid = sigmoid_lanes<A>(chosen(logits, j));
        gates[j] = sigmoid.value;
        slopes[j] = sigmoid.slope;
        sum += gates[j];
      }
      if (order == RouterOrder::kSigmoidTopK) return;
      sum += static_cast<A>(kRouterSumFloor);
    }
    for (std::int64_t j = 0; j < k; ++j) {
      gates[j] /= sum;
      slopes[j] /= sum;
    }
  }
};

// Keys of the experts outside the best groups become the least integer: they are not chosen.
template <typename A>
class GroupFilter {
  using Key = KeyOf<A>;
  static constexpr int w = kWidth<A>;

 public:
  GroupFilter(const RouterRanking& ranking, std::int64_t num_experts)
      : ranking_(ranking),
        groups_(ranking.leaves_groups_out() ? ranking.num_groups : 0),
        size_(num_experts / ranking.num_groups),
        keys_(groups_),
        kept_(groups_),
        ids_(groups_ == 0 ? 0 : ranking.top_groups * w) {}

  // keys[e] = rank_key(values[e])
  void apply(const Vec<A>* values, Vec<Key>* keys) {
    if (groups_ == 0) return;
    for (std::int64_t g = 0; g < groups_; ++g) {
      keys_[g] = rank_key<A>(score(values + g * size_, keys + g * size_));
      kept_[g] = Vec<Key>{};
    }
    largest_keys<A>(groups_, keys_.data(), ranking_.top_groups, ids_.data());
    for (std::int64_t j = 0; j < ranking_.top_groups; ++j) {
      for (int i = 0; i < w; ++i) kept_[ids_[j * w + i]][i] = -1;
    }
    for (std::int64_t g = 0; g < groups_; ++g) {
      for (std::int64_t e = g * size_; e < (g + 1) * size_; ++e) {
        keys[e] = kept_[g] ? keys[e] : Vec<Key>{} + std::numeric_limits<Key>::min();
      }
    }
  }

 private:
  // The sum of the one or two largest values of a group.
  Vec<A> score(const Vec<A>* values, const Vec<Key>* keys) const {
    Vec<A> best = values[0], second = {};
    Vec<Key> best_key = keys[0], second_key = Vec<Key>{} + std::numeric_limits<Key>::min();
    for (std::int64_t e = 1; e < size_; ++e) {
      const Vec<Key> first = keys[e] > best_key, next = keys[e] > second_key;
      second = first ? best : (next ? values[e] : second);
      second_key = first ? best_key : (next ? keys[e] : second_key);
      best = first ? values[e] : best;
      best_key = first ? keys[e] : best_key;
    }
    return ranking_.scored_per_group == 1 ? best : best + second;
  }

  const RouterRanking& ranking_;
  std::int64_t groups_, size_;
  AlignedBuffer<Vec<Key>> keys_, kept_;
  AlignedBuffer<std::int32_t> ids_;
};

}  // namespace mfx::MFX_ISA
