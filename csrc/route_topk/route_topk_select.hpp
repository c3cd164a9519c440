// Softmax, ranking and their derivative for a group of tokens, one token per vector lane: lane i of element e of an
// array belongs to token i and expert e. No step crosses lanes, so small E costs no more than its arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/simd.hpp"

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

// gates[j] = softmax over the k choices of their logits, ids [k][lanes].
template <typename A>
inline void softmax_choices(const Vec<A>* logits, std::int64_t k, const std::int32_t* ids, Vec<A>* gates) {
  Vec<A> largest = gather_choice<A>(logits, ids), sum = {};
  for (std::int64_t j = 1; j < k; ++j) largest = max(gather_choice<A>(logits, ids + j * kWidth<A>), largest);
  for (std::int64_t j = 0; j < k; ++j) {
    gates[j] = exp(gather_choice<A>(logits, ids + j * kWidth<A>) - largest);
    sum += gates[j];
  }
  for (std::int64_t j = 0; j < k; ++j) gates[j] /= sum;
}

}  // namespace mfx::MFX_ISA
