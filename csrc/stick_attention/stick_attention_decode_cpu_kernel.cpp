// One split of a cache, walked in tiles from the newest key to the oldest; see README.md for the recurrence.
//
// A tile's K rows are multiplied with blocks of query rows, every load of K serving all rows of a block; the scan runs
// on the [rows, tile] scores in the linear domain; the V rows, which are the K rows still in cache where K is V, are
// summed over strips of the head dimension in registers. Whatever is read next is prefetched by the loop before it, in
// step with its own reads: hardware prefetchers do not follow a walk that turns back after each tile.
#include <algorithm>

#include "core/aligned_buffer.hpp"
#include "core/denormals.hpp"
#include "core/simd.hpp"
#include "stick_attention/stick_attention_decode_cpu.hpp"
#include "stick_attention/stick_exhausted.hpp"
#include "stick_attention/stick_scan.hpp"

namespace mfx::MFX_ISA {
namespace {

constexpr int kTileKeys = 16;
constexpr int kMaxRowBlock = 4;
constexpr int kAccumulators = kVectorRegisters == 32 ? 16 : 8;

void prefetch(const void* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Rows of a tile: keys * stride apart, or their mirror image in the array that is read next.
template <typename T>
struct Rows {
  const T* first;
  std::int64_t stride;
  const T* row(std::int64_t j) const { return first + j * stride; }
};

template <typename T>
class SplitWalk {
 public:
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int kW = kWidth<A>;

  SplitWalk(const StickAttentionDecodeParams& params, const StickDecodeSplit& split, const StickDecodePart& part)
      : p(params),
        split(split),
        rows(p.num_new * p.group_size),
        row_elements(stick_decode_row_elements(p)),
        paired(p.head_dim / (2 * kW) * (2 * kW)),
        out(static_cast<A*>(part.out)),
        remainder(part.remainder),
        queries(rows * row_elements),
        weights(rows * kTileKeys),
        exp_logit(p.scale) {
    for (std::int64_t i = 0; i < rows * row_elements; ++i) out[i] = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      remainder[row] = 1;
      const T* q = static_cast<const T*>(p.q) + split.batch * p.q_strides.batch + split.kv_head * p.q_strides.head +
                   row / p.group_size * p.q_strides.token + row % p.group_size * p.q_strides.group;
      A* wide = &queries[row * row_elements];
      for (std::int64_t d = 0; d < paired; d += 2 * kW) {
        const auto pair = load_pair(q + d);
        store(wide + d, pair.first);
        store(wide + d + kW, pair.second);
      }
      for (std::int64_t d = paired; d < p.head_dim; d += kW) store(wide + d, load_rest(q, d));
    }
  }

  void run() {
    const ScopedFlushDenormals flush;
    for (std::int64_t end = split.end; end > split.begin;) {
      const int keys = static_cast<int>(end - split.begin < kTileKeys ? end - split.begin : kTileKeys);
      const std::int64_t begin = end - keys;
      if (any_kept(begin, end)) {
        tile(begin, keys);
        if (all_exhausted()) return;
      }
      end = begin;
    }
  }

 private:
  bool kept(std::int64_t key) const {
    return p.key_padding_mask == nullptr ||
           p.key_padding_mask[split.batch * p.mask_batch_stride + key * p.mask_key_stride];
  }
  bool any_kept(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t key = begin; key < end; ++key) {
      if (kept(key)) return true;
    }
    return false;
  }

  bool all_exhausted() const {
    return std::all_of(remainder, remainder + rows, [this](double rem) { return exhausted(rem, p.stick_epsilon); });
  }

  // A vector of head dimensions beyond the pairs; zeros beyond the head.
  V load_rest(const T* row, std::int64_t d) const {
    return d + kW <= p.head_dim ? load(row + d) : load_partial(row + d, static_cast<int>(p.head_dim - d));
  }

  Rows<T> keys_at(std::int64_t key) const {
    return {static_cast<const T*>(p.k_cache) + split.batch * p.k_strides.batch + split.kv_head * p.k_strides.head +
                key * p.k_strides.token,
            p.k_strides.token};
  }
  Rows<T> values_at(std::int64_t key) const {
    return {static_cast<const T*>(p.v_cache) + split.batch * p.v_strides.batch + split.kv_head * p.v_strides.head +
                key * p.v_strides.token,
            p.v_strides.token};
  }

  void tile(std::int64_t begin, int keys) {
    const Rows<T> k = keys_at(begin), v = values_at(begin);
    // The tile before this one; at the start of the cache this one again, which costs nothing.
    const Rows<T> next = begin - split.begin >= kTileKeys ? keys_at(begin - kTileKeys) : k;
    for_row_blocks([&]<int kRows>(std::int64_t row) { scores<kRows>(row, k, keys, row == 0, v); });
    for (std::int64_t row = 0; row < rows; ++row) scan(row, begin, keys);
    if (!all_seen(begin, keys)) {
      for (std::int64_t row = 0; row < rows; ++row) values_seen(row, begin, v, keys, next);
      return;
    }
    for_row_blocks([&]<int kRows>(std::int64_t row) { values<kRows>(row, 0, v, keys, row == 0, next); });
  }

  // Calls f.operator()<kRows>(row) for all rows in blocks of kRows, from `row` on.
  template <typename F>
  void for_row_blocks(F f) const {
    for (std::int64_t row = 0; row < rows; row += kMaxRowBlock) {
      switch (rows - row) {
        case 1: f.template operator()<1>(row); break;
        case 2: f.template operator()<2>(row); break;
        case 3: f.template operator()<3>(row); break;
        default: f.template operator()<4>(row); break;
      }
    }
  }

  // The newest key a row may see.
  std::int64_t newest_key(std::int64_t row) const {
    return p.lengths[split.batch] - p.num_new + row / p.group_size - (p.attend_current ? 0 : 1);
  }
  bool sees(std::int64_t row, std::int64_t key) const { return key <= newest_key(row) && kept(key); }

  // Whether every row sees every key of the tile.
  bool all_seen(std::int64_t begin, int keys) const {
    if (begin + keys - 1 > newest_key(0)) return false;
    for (std::int64_t key = begin; p.key_padding_mask != nullptr && key < begin + keys; ++key) {
      if (!kept(key)) return false;
    }
    return true;
  }

  // values() of a row, from the runs of keys that it sees: a weight of 0 would not keep NaN or infinity out.
  void values_seen(std::int64_t row, std::int64_t begin, Rows<T> v, int keys, Rows<T> next) {
    for (int first = 0, end = 0; first < keys; first = end + 1) {
      for (end = first; end < keys && sees(row, begin + end);) ++end;
      if (end == first) continue;
      values<1>(row, first, {v.row(first), v.stride}, end - first, row == 0, {next.row(first), next.stride});
    }
  }

  // weights[row, j] = q_row . k_j for a block of rows.
  template <int kRows>
  void scores(std::int64_t row, Rows<T> k, int keys, bool fetch, Rows<T> fetched) {
    constexpr int kKeys = kAccumulators / (kRows == 3 ? 4 : kRows);
    fetch = fetch && !p.k_is_v;
    int j = 0;
    for (; j + kKeys <= keys; j += kKeys) {
      if (fetch) {
        for (int jj = 0; jj < kKeys; ++jj) prefetch(fetched.row(j + jj), p.head_dim * std::int64_t{sizeof(T)});
      }
      score_block<kRows, kKeys>(row, k, j);
    }
    for (; j < keys; ++j) {
      if (fetch) prefetch(fetched.row(j), p.head_dim * std::int64_t{sizeof(T)});
      score_block<kRows, 1>(row, k, j);
    }
  }

  template <int kRows, int kKeys>
  void score_block(std::int64_t row, Rows<T> k, int j) {
    const A* q = &queries[row * row_elements];
    const T* key[kKeys];
    V sum[kRows * kKeys];
    for (int jj = 0; jj < kKeys; ++jj) key[jj] = k.row(j + jj);
    for (int i = 0; i < kRows * kKeys; ++i) sum[i] = V{};
    for (std::int64_t d = 0; d < paired; d += 2 * kW) {
      V first[kRows], second[kRows];
      for (int i = 0; i < kRows; ++i) {
        first[i] = load(q + i * row_elements + d);
        second[i] = load(q + i * row_elements + d + kW);
      }
      for (int jj = 0; jj < kKeys; ++jj) {
        const auto pair = load_pair(key[jj] + d);
        for (int i = 0; i < kRows; ++i) {
          sum[i * kKeys + jj] += first[i] * pair.first;
          sum[i * kKeys + jj] += second[i] * pair.second;
        }
      }
    }
    for (std::int64_t d = paired; d < p.head_dim; d += kW) {
      for (int jj = 0; jj < kKeys; ++jj) {
        const V x = load_rest(key[jj], d);
        for (int i = 0; i < kRows; ++i) sum[i * kKeys + jj] += load(q + i * row_elements + d) * x;
      }
    }
    A total[kRows * kKeys];
    if constexpr (kRows * kKeys == kW) {
      store(total, reduce_add_each(sum));
    } else {
      for (int i = 0; i < kRows * kKeys; ++i) total[i] = reduce_add(sum[i]);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int jj = 0; jj < kKeys; ++jj) weights[(row + i) * kTileKeys + j + jj] = total[i * kKeys + jj];
    }
  }

  // Replaces a row's scores by its weights A and takes the tile's share off its stick.
  void scan(std::int64_t row, std::int64_t begin, int keys) {
    A* weight = &weights[row * kTileKeys];
    alignas(64) A beta[kTileKeys], u[kTileKeys];  // u = 1 - beta
    for (int j = 0; j < kTileKeys; j += kW) {
      const V e = exp_logit(load(weight + j));
      const V one_minus_beta = reciprocal(1 + e);
      store(u + j, one_minus_beta);
      store(beta + j, e * one_minus_beta);
    }
    if (p.key_padding_mask != nullptr || begin + keys - 1 > newest_key(row)) {
      for (int j = 0; j < keys; ++j) {
        if (!sees(row, begin + j)) beta[j] = 0, u[j] = 1;
      }
    }
    A product = 1, taken = 0;
    for (int j = keys - 1; j >= 0; --j) {
      weight[j] = beta[j] * product;
      taken += weight[j];
      product *= u[j];
    }
    const A rem = static_cast<A>(remainder[row]);
    for (int j = 0; j < keys; ++j) weight[j] *= rem;
    remainder[row] *= stick_rem_after(1.0, static_cast<double>(taken), static_cast<double>(product));
  }

  // out[row] += sum_j weights[row, first + j] v_j for a block of rows.
  template <int kRows>
  void values(std::int64_t row, int first, Rows<T> v, int keys, bool fetch, Rows<T> fetched) {
    const A* const weight = &weights[row * kTileKeys + first];
    constexpr int kPairs = kAccumulators / (kRows == 1 ? 2 : kRows == 3 ? 4 : kRows) / 2;
    std::int64_t d = 0;
    for (; d + kPairs * 2 * kW <= paired; d += kPairs * 2 * kW) {
      value_strip<kRows, kPairs>(row, weight, v, keys, d, fetch, fetched);
    }
    for (; d < paired; d += 2 * kW) value_strip<kRows, 1>(row, weight, v, keys, d, fetch, fetched);
    for (; d < p.head_dim; d += kW) {
      for (int i = 0; i < kRows; ++i) {
        A* o = out + (row + i) * row_elements + d;
        V sum = load(o);
        for (int j = 0; j < keys; ++j) sum += weight[i * kTileKeys + j] * load_rest(v.row(j), d);
        store(o, sum);
      }
    }
  }

  template <int kRows, int kPairs>
  void value_strip(std::int64_t row, const A* weight, Rows<T> v, int keys, std::int64_t d, bool fetch,
                   Rows<T> fetched) {
    A* o = out + row * row_elements + d;
    V first[kRows][kPairs], second[kRows][kPairs];
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kPairs; ++c) {
        first[i][c] = load(o + i * row_elements + 2 * c * kW);
        second[i][c] = load(o + i * row_elements + (2 * c + 1) * kW);
      }
    }
    for (int j = 0; j < keys; ++j) {
      if (fetch) prefetch(fetched.row(j) + d, kPairs * 2 * kW * std::int64_t{sizeof(T)});
      const T* value = v.row(j) + d;
      for (int c = 0; c < kPairs; ++c) {
        const auto pair = load_pair(value + 2 * c * kW);
        for (int i = 0; i < kRows; ++i) {
          first[i][c] += weight[i * kTileKeys + j] * pair.first;
          second[i][c] += weight[i * kTileKeys + j] * pair.second;
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kPairs; ++c) {
        store(o + i * row_elements + 2 * c * kW, first[i][c]);
        store(o + i * row_elements + (2 * c + 1) * kW, second[i][c]);
      }
    }
  }

  const StickAttentionDecodeParams& p;
  const StickDecodeSplit& split;
  const std::int64_t rows, row_elements;
  const std::int64_t paired;  // head dimensions in whole pairs of vectors, which sums keep in the order of load_pair
  A* const out;               // [rows, row_elements]
  double* const remainder;    // [rows]; double, because a long walk multiplies it thousands of times
  AlignedBuffer<A> queries;   // [rows, row_elements], widened once
  AlignedBuffer<A> weights;   // [rows, kTileKeys]: scores, then A
  const ExpLogit<A> exp_logit;
};

template <typename T>
void combine(const StickAttentionDecodeParams& p, const StickDecodePart& total, const StickDecodePart& older) {
  using A = Accumulate<T>;
  const std::int64_t elements = stick_decode_row_elements(p);
  for (std::int64_t row = 0; row < p.num_new * p.group_size; ++row) {
    A* o = static_cast<A*>(total.out) + row * elements;
    const A* more = static_cast<const A*>(older.out) + row * elements;
    const A rem = static_cast<A>(total.remainder[row]);
    for (std::int64_t d = 0; d < elements; d += kWidth<A>) store(o + d, load(o + d) + rem * load(more + d));
    total.remainder[row] *= older.remainder[row];
  }
}

template <typename T>
void store_result(const StickAttentionDecodeParams& p, std::int64_t batch, std::int64_t head,
                  const StickDecodePart& total) {
  using A = Accumulate<T>;
  constexpr int kW = kWidth<A>;
  const std::int64_t elements = stick_decode_row_elements(p);
  for (std::int64_t t = 0; t < p.num_new; ++t) {
    for (std::int64_t g = 0; g < p.group_size; ++g) {
      const std::int64_t row = t * p.group_size + g;
      const A* from = static_cast<const A*>(total.out) + row * elements;
      T* to = static_cast<T*>(p.out) + batch * p.out_strides.batch + t * p.out_strides.token +
              head * p.out_strides.head + g * p.out_strides.group;
      std::int64_t d = 0;
      for (; d + 2 * kW <= p.head_dim; d += 2 * kW) {
        const auto pair = in_order<T>(VecPair<Vec<A>>{load(from + d), load(from + d + kW)});
        store(to + d, pair.first);
        store(to + d + kW, pair.second);
      }
      for (; d + kW <= p.head_dim; d += kW) store(to + d, load(from + d));
      if (d < p.head_dim) store_partial(to + d, load(from + d), static_cast<int>(p.head_dim - d));
      static_cast<A*>(p.remainder)[((batch * p.num_new + t) * p.num_kv_heads + head) * p.group_size + g] =
          static_cast<A>(total.remainder[row]);
    }
  }
}

}  // namespace

void stick_decode_split(const StickAttentionDecodeParams& params, const StickDecodeSplit& split,
                        const StickDecodePart& part) {
  with_dtype(params.dtype, [&](auto type) { SplitWalk<decltype(type)>(params, split, part).run(); });
}

void stick_decode_combine(const StickAttentionDecodeParams& params, const StickDecodePart& total,
                          const StickDecodePart& older) {
  with_dtype(params.dtype, [&](auto type) { combine<decltype(type)>(params, total, older); });
}

void stick_decode_store(const StickAttentionDecodeParams& params, std::int64_t batch, std::int64_t kv_head,
                        const StickDecodePart& total) {
  with_dtype(params.dtype, [&](auto type) { store_result<decltype(type)>(params, batch, kv_head, total); });
}

}  // namespace mfx::MFX_ISA
