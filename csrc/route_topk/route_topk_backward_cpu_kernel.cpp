// Two phases. Over tiles of tokens: the derivative of softmax, gates and sums gives the gradient of the logits, then
// of the hidden layer and of x; what the weight gradients need is left behind transposed, tile by tile. Then over
// blocks of the weight gradients, each summed over all tiles in order by one thread, so that the bits do not depend
// on the number of threads.
#include <algorithm>
#include <type_traits>

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

constexpr std::int64_t kRowBlock = 256;     // rows of a weight gradient per task
constexpr std::int64_t kChunkTokens = 256;  // tokens per product of a weight gradient, whole tiles
constexpr std::int64_t kRowsAhead = 16;     // of x, whose strips are read a row apart
template <typename T>
constexpr std::int64_t kLine = 64 / sizeof(T);  // elements of a cache line

// d loss / d logits of a group of tokens, in lanes.
template <typename A>
class LogitGradient {
  static constexpr int w = kWidth<A>;

 public:
  explicit LogitGradient(const RouteTopKBackwardParams& p)
      : p_(p),
        experts_(p.network.num_experts),
        logits_(experts_),
        probs_(experts_),
        grad_(experts_),
        extra_(experts_),
        gates_(p.k),
        slopes_(p.k),
        ids_(p.k * w) {}

  // Valid until the next call.
  const Vec<A>* compute(std::int64_t token, int present) {
    load_lanes(static_cast<const A*>(p_.logits) + token * experts_, experts_, present, experts_, logits_.data());
    const LogPartition<A> partition = softmax_lanes<A>(experts_, logits_.data(), probs_.data());
    const A* prob_sum = static_cast<const A*>(p_.grad_prob_sum);
    const A plogp = p_.grad_plogp_sum == nullptr ? A{0} : *static_cast<const A*>(p_.grad_plogp_sum);
    const A square = p_.grad_logsumexp_sq_sum == nullptr ? A{0} : *static_cast<const A*>(p_.grad_logsumexp_sq_sum);
    // grad_ = d loss / d p. The derivative of p log p is log p + 1; the one vanishes in the softmax.
    for (std::int64_t e = 0; e < experts_; ++e) {
      grad_[e] = broadcast(prob_sum == nullptr ? A{0} : prob_sum[e]);
      if (plogp != A{0}) grad_[e] += plogp * log_prob(logits_[e], probs_[e], partition);
    }
    load_logit_gradients(token, present);
    if (p_.grad_gates != nullptr) add_gates(token, present);
    Vec<A> mean = {};
    for (std::int64_t e = 0; e < experts_; ++e) mean += probs_[e] * grad_[e];
    const Vec<A> shift = A{2} * square * (partition.largest + partition.log_sum) - mean;
    for (std::int64_t e = 0; e < experts_; ++e) grad_[e] = probs_[e] * (grad_[e] + shift) + extra_[e];
    return grad_.data();
  }

 private:
  void load_logit_gradients(std::int64_t token, int present) {
    if (p_.grad_logits == nullptr) {
      std::fill_n(extra_.data(), experts_, Vec<A>{});
    } else {
      const A* rows = static_cast<const A*>(p_.grad_logits) + token * experts_;
      load_lanes(rows, experts_, present, experts_, extra_.data());
    }
  }

  // Into grad_ where the gate is p itself, into extra_ where it has a derivative of its own.
  void add_gates(std::int64_t token, int present) {
    const A* grad_gates = static_cast<const A*>(p_.grad_gates) + token * p_.k;
    const std::int32_t* expert_ids = p_.expert_ids + token * p_.k;
    const A scale = static_cast<A>(p_.scale);
    std::fill_n(ids_.data(), p_.k * w, 0);
    for (int i = 0; i < present; ++i) {
      for (std::int64_t j = 0; j < p_.k; ++j) ids_[j * w + i] = expert_ids[i * p_.k + j];
    }
    if (p_.order == RouterOrder::kSoftmaxTopK) {
      for (int i = 0; i < present; ++i) {
        for (std::int64_t j = 0; j < p_.k; ++j) grad_[ids_[j * w + i]][i] += scale * grad_gates[i * p_.k + j];
      }
      return;
    }
    ChosenGates<A>{gates_.data(), slopes_.data()}.compute(p_.order, logits_.data(), probs_.data(), p_.k, ids_.data());
    for (int i = 0; i < present; ++i) {
      A mean = 0;
      for (std::int64_t j = 0; p_.order != RouterOrder::kSigmoidTopK && j < p_.k; ++j) {
        mean += gates_[j][i] * grad_gates[i * p_.k + j];
      }
      for (std::int64_t j = 0; j < p_.k; ++j) {
        extra_[ids_[j * w + i]][i] += scale * slopes_[j][i] * (grad_gates[i * p_.k + j] - mean);
      }
    }
  }

  const RouteTopKBackwardParams& p_;
  std::int64_t experts_;
  AlignedBuffer<Vec<A>> logits_, probs_, grad_, extra_, gates_, slopes_;
  AlignedBuffer<std::int32_t> ids_;
};

// What phase one leaves for the weight gradients: for each chunk of kChunkTokens tokens a matrix [rows][kChunkTokens],
// zero from the last token to the end of its tile.
template <typename T>
class TransposedChunks {
 public:
  TransposedChunks(std::int64_t chunks, std::int64_t rows) : rows_(rows), data_(chunks * rows * kChunkTokens) {}
  T* chunk(std::int64_t i) { return data_.data() + i * rows_ * kChunkTokens; }

  // From rows [count][>= rows rounded up to kAlign] of a tile, columns beyond `rows` being readable.
  template <typename A>
  void store_tile(std::int64_t tile, std::int64_t count, const A* from, std::int64_t ld) {
    constexpr int w = kWidth<A>;
    const std::int64_t first = tile * kTileTokens;
    T* to = chunk(first / kChunkTokens) + first % kChunkTokens;
    for (std::int64_t token = 0; token < kTileTokens; token += w) {
      const int present = static_cast<int>(std::clamp<std::int64_t>(count - token, 0, w));
      for (std::int64_t row = 0; row < rows_; row += w) {
        Vec<A> block[w] = {};
        for (int l = 0; l < present; ++l) block[l] = load(from + (token + l) * ld + row);
        transpose<A>(block);
        const int valid = static_cast<int>(std::min<std::int64_t>(w, rows_ - row));
        for (int l = 0; l < valid; ++l) store(to + (row + l) * kChunkTokens + token, block[l]);
      }
    }
  }

 private:
  std::int64_t rows_;
  Scratch<T> data_;
};

// grad [rows, columns] = sum over chunks i of chunks[i] [rows, tokens] B_i [tokens, columns], for the rows of those
// segments whose gradient is wanted. pack(first, count, column, b) fills `b` with B's columns from `column` on for the
// tokens [first, first + count), and with zeros up to the next multiple of kAlign.
template <typename Op, typename Pack>
void weight_gradient(std::int64_t tokens, TransposedChunks<Op>& chunks, std::int64_t columns, DType dtype,
                     std::int64_t num_segments, void* const* segments, const std::int64_t* segment_rows, Pack pack) {
  using A = Accumulate<Op>;
  struct Block {
    std::int64_t row_of_chunk, row, rows;
    void* segment;
  };
  std::vector<Block> blocks;
  std::int64_t before = 0;
  for (std::int64_t s = 0; s < num_segments; before += segment_rows[s++]) {
    for (std::int64_t row = 0; segments[s] != nullptr && row < segment_rows[s]; row += kRowBlock) {
      blocks.push_back({before + row, row, std::min(kRowBlock, segment_rows[s] - row), segments[s]});
    }
  }
  const std::int64_t panels = ceil_div(columns, kPanel);
  parallel_tasks(panels * static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task) {
    const BrgemmScope scope;
    const Block& block = blocks[static_cast<std::size_t>(task / panels)];
    const std::int64_t column = task % panels * kPanel, width = std::min(kPanel, columns - column);
    PackedB<Op> b(kChunkTokens, width);
    const std::int64_t ld = b.padded();
    Scratch<A> sum(block.rows * ld);
    if (tokens == 0) std::fill_n(sum.data(), block.rows * ld, A{0});
    for (std::int64_t first = 0; first < tokens; first += kChunkTokens) {
      const std::int64_t count = std::min(kChunkTokens, tokens - first);
      pack(first, count, column, b);
      tile_gemm(block.rows, ld, round_up(count, kAlign),
                chunks.chunk(first / kChunkTokens) + block.row_of_chunk * kChunkTokens, kChunkTokens, b.panel(0), ld,
                sum.data(), ld, first > 0);
    }
    with_storage<A>(dtype, [&](auto storage) {
      auto* grad = static_cast<decltype(storage)*>(block.segment) + block.row * columns + column;
      for (std::int64_t row = 0; row < block.rows; ++row) convert(sum.data() + row * ld, width, grad + row * columns);
    });
  });
}

// A linear gate's gradients of a few tokens, without packed weights.
template <typename A>
void backward_few(const RouteTopKBackwardParams& p) {
  const RouterGateParams& n = p.network;
  const std::int64_t experts = n.num_experts, tokens = n.num_tokens, dim = n.dim, ld = round_up(experts, kWidth<A>);
  AlignedBuffer<A> grad(tokens * ld), copy(tokens * dim);
  LogitGradient<A> logit_gradient(p);
  for (std::int64_t token = 0; token < tokens; token += kWidth<A>) {
    const int present = static_cast<int>(std::min<std::int64_t>(kWidth<A>, tokens - token));
    store_lanes(logit_gradient.compute(token, present), experts, present, grad.data() + token * ld, ld);
  }
  if (p.grad_x != nullptr) {
    AlignedBuffer<A> sums(tokens * dim);
    multiply_few_back(tokens, grad.data(), ld, expert_rows(n), sums.data());
    with_storage<A>(n.x_dtype, [&](auto storage) {
      convert(sums.data(), tokens * dim, static_cast<decltype(storage)*>(p.grad_x));
    });
  }
  const A* const x = operand_rows(n, 0, tokens, copy.data());
  const std::int64_t grain = ceil_div(kParallelBytes, std::max<std::int64_t>(1, dim * element_size(n.weight_dtype)));
  const A* factors = grad.data();
  for (std::int64_t s = 0; s < n.num_segments; factors += n.num_rows[s++]) {
    if (p.grad_segments[s] == nullptr) continue;
    parallel_for(n.num_rows[s], grain, [&](std::int64_t begin, std::int64_t end) {
      with_storage<A>(n.weight_dtype, [&](auto storage) {
        auto* row = static_cast<decltype(storage)*>(p.grad_segments[s]) + begin * dim;
        for (std::int64_t r = begin; r < end; ++r, row += dim) {
          for_lanes<A>(dim, [&](std::int64_t l, int lanes) {
            Vec<A> sum = {};
            for (std::int64_t t = 0; t < tokens; ++t)
              sum += factors[t * ld + r] * load_lanes_of(x + t * dim + l, lanes);
            store_lanes_of(row + l, sum, lanes);
          });
        }
      });
    });
  }
}

template <typename Op>
class Backward {
  using A = Accumulate<Op>;
  static constexpr int w = kWidth<A>;

 public:
  explicit Backward(const RouteTopKBackwardParams& p)
      : p_(p),
        n_(p.network),
        hidden_layer_(has_hidden_layer(n_.gate)),
        wants_experts_(std::any_of(p.grad_segments, p.grad_segments + n_.num_segments, [](void* g) { return g; })),
        wants_input_weight_(hidden_layer_ ? p.grad_hidden_weight != nullptr : wants_experts_),
        num_tiles_(ceil_div(n_.num_tokens, kTileTokens)),
        num_chunks_(ceil_div(n_.num_tokens, kChunkTokens)),
        // Rows of the product that meets x: V's, or W's where there is no V.
        inner_(hidden_layer_ ? n_.hidden_dim : n_.num_experts),
        grad_inner_(wants_input_weight_ ? num_chunks_ : 0, inner_),
        grad_logits_(hidden_layer_ && wants_experts_ ? num_chunks_ : 0, n_.num_experts),
        bias_sums_(p.grad_hidden_bias != nullptr ? num_tiles_ * n_.hidden_dim : 0) {}

  void run() {
    tokens();
    if (n_.gate == RouterGate::kLogits) return;
    if (hidden_layer_) {
      if (p_.grad_hidden_bias != nullptr) sum_bias();
      if (wants_experts_) expert_gradient();
    }
    if (wants_input_weight_) input_weight_gradient();
  }

 private:
  void tokens() {
    const bool wants_x = p_.grad_x != nullptr && n_.gate != RouterGate::kLogits;
    PackedB<Op> back_to_x(wants_x ? inner_ : 0, n_.dim);
    if (wants_x) back_to_x.pack(hidden_layer_ ? hidden_rows(n_) : expert_rows(n_));
    const bool wants_hidden = hidden_layer_ && (wants_x || p_.grad_hidden_weight || p_.grad_hidden_bias);
    PackedB<A> back_to_hidden(wants_hidden ? n_.num_experts : 0, n_.hidden_dim);
    if (wants_hidden) back_to_hidden.pack(expert_rows(n_));

    parallel_for(num_tiles_, 1, [&](std::int64_t begin, std::int64_t end) {
      const BrgemmScope scope;
      const std::int64_t ld = round_up(n_.num_experts, kAlign), ld_hidden = round_up(n_.hidden_dim, kAlign);
      Scratch<A> grad(kTileTokens * ld), hidden(wants_hidden ? kTileTokens * ld_hidden : 0);
      Scratch<Op> operand(wants_x ? kTileTokens * round_up(inner_, kAlign) : 0);
      Scratch<A> grad_x(wants_x ? kTileTokens * kPanel : 0);
      LogitGradient<A> logit_gradient(p_);
      for (std::int64_t tile = begin; tile < end; ++tile) {
        const std::int64_t first = tile * kTileTokens, count = std::min(kTileTokens, n_.num_tokens - first);
        std::fill_n(grad.data(), kTileTokens * ld, A{0});
        for (std::int64_t token = 0; token < count; token += w) {
          const int present = static_cast<int>(std::min<std::int64_t>(w, count - token));
          const Vec<A>* lanes = logit_gradient.compute(first + token, present);
          store_lanes(lanes, n_.num_experts, present, grad.data() + token * ld, ld);
        }
        const A* inner = grad.data();
        std::int64_t ld_inner = ld;
        if (hidden_layer_ && wants_experts_) grad_logits_.store_tile(tile, count, grad.data(), ld);
        if (wants_hidden) {
          back_to_hidden.multiply(count, grad.data(), ld, hidden.data(), ld_hidden);
          activate_backward(tile, count, hidden.data(), ld_hidden);
          inner = hidden.data();
          ld_inner = ld_hidden;
        }
        if (wants_input_weight_) grad_inner_.store_tile(tile, count, inner, ld_inner);
        if (n_.gate == RouterGate::kLogits) {
          write_x(first, count, 0, n_.dim, inner, ld_inner);
        } else if (wants_x) {
          convert(inner, count * ld_inner, operand.data());
          for (std::int64_t column = 0; column < n_.dim; column += kPanel) {
            const std::int64_t width = back_to_x.width(column);
            tile_gemm(count, width, back_to_x.k(), operand.data(), ld_inner, back_to_x.panel(column), width,
                      grad_x.data(), width, false);
            write_x(first, count, column, std::min(width, n_.dim - column), grad_x.data(), width);
          }
        }
      }
    });
  }

  // Columns [column, column + width) of grad_x, rows of tokens from `first` on.
  void write_x(std::int64_t first, std::int64_t count, std::int64_t column, std::int64_t width, const A* from,
               std::int64_t ld) {
    if (p_.grad_x == nullptr) return;
    with_storage<A>(n_.x_dtype, [&](auto storage) {
      auto* to = static_cast<decltype(storage)*>(p_.grad_x) + first * n_.dim + column;
      for (std::int64_t i = 0; i < count; ++i) convert(from + i * ld, width, to + i * n_.dim);
    });
  }

  const A* hidden_row(std::int64_t token) const { return static_cast<const A*>(p_.hidden) + token * n_.hidden_dim; }

  // grad [count, ld]: from after the nonlinearity to before it, in place. Columns beyond G become zero.
  void activate_backward(std::int64_t tile, std::int64_t count, A* grad, std::int64_t ld) {
    const std::int64_t size = n_.hidden_dim;
    A* bias_sum = p_.grad_hidden_bias == nullptr ? nullptr : bias_sums_.data() + tile * size;
    if (bias_sum != nullptr) std::fill_n(bias_sum, size, A{0});
    for (std::int64_t i = 0; i < count; ++i, grad += ld) {
      const A* z = hidden_row(tile * kTileTokens + i);
      A scale = 0, along = 0;
      if (n_.gate == RouterGate::kGmm) {
        scale = inverse_norm(z, size);
        // Below the floor the norm is a constant.
        along = scale < static_cast<A>(1 / kRouterNormFloor) ? dot_row(z, grad, size) * scale * scale : A{0};
      }
      for_lanes<A>(size, [&](std::int64_t column, int lanes) {
        const Vec<A> value = load_lanes_of(z + column, lanes), g = load_lanes_of(grad + column, lanes);
        const Vec<A> result = n_.gate == RouterGate::kGmm ? scale * (g - value * along) : g * gelu_slope<A>(value);
        store_lanes_of(grad + column, result, lanes);
        if (bias_sum != nullptr) {
          store_lanes_of(bias_sum + column, load_lanes_of(bias_sum + column, lanes) + result, lanes);
        }
      });
      std::fill(grad + size, grad + ld, A{0});
    }
  }

  void sum_bias() {
    for (std::int64_t column = 0; column < n_.hidden_dim; ++column) {
      double sum = 0;
      for (std::int64_t tile = 0; tile < num_tiles_; ++tile) sum += bias_sums_[tile * n_.hidden_dim + column];
      static_cast<A*>(p_.grad_hidden_bias)[column] = static_cast<A>(sum);
    }
  }

  void input_weight_gradient() {
    const auto pack = [&](std::int64_t first, std::int64_t count, std::int64_t column, PackedB<Op>& b) {
      with_storage<A>(n_.x_dtype, [&](auto storage) {
        using S = decltype(storage);
        const S* x = static_cast<const S*>(n_.x) + first * n_.dim + column;
        const auto row = [&](std::int64_t i) { return i < count ? x + i * n_.dim : nullptr; };
        constexpr std::int64_t kStep = std::is_same_v<Op, BFloat16> ? 2 : 1;
        for (std::int64_t i = 0; i < round_up(count, kAlign); i += kStep) {
          for (std::int64_t ahead = i + kRowsAhead; ahead < i + kRowsAhead + kStep; ++ahead) {
            for (std::int64_t at = 0; at < kPanel; at += kLine<S>) prefetch_far(x + ahead * n_.dim + at);
          }
          b.pack_rows(i, row(i), row(i + 1));
        }
      });
    };
    if (hidden_layer_) {
      weight_gradient(n_.num_tokens, grad_inner_, n_.dim, n_.hidden_weight_dtype, 1, &p_.grad_hidden_weight,
                      &n_.hidden_dim, pack);
    } else {
      weight_gradient(n_.num_tokens, grad_inner_, n_.dim, n_.weight_dtype, n_.num_segments, p_.grad_segments,
                      n_.num_rows, pack);
    }
  }

  // B is the activated hidden layer, computed again: cheaper than keeping it.
  void expert_gradient() {
    AlignedBuffer<A> scales(n_.gate == RouterGate::kGmm ? n_.num_tokens : 0);
    if (n_.gate == RouterGate::kGmm) {
      for (std::int64_t token = 0; token < n_.num_tokens; ++token) {
        scales[token] = inverse_norm(hidden_row(token), n_.hidden_dim);
      }
    }
    const auto pack = [&](std::int64_t first, std::int64_t count, std::int64_t column, PackedB<A>& b) {
      const std::int64_t size = std::min(kPanel, n_.hidden_dim - column);
      A row[kPanel];
      for (std::int64_t i = 0; i < count; ++i) {
        const A* z = hidden_row(first + i) + column;
        for_lanes<A>(size, [&](std::int64_t l, int lanes) {
          const Vec<A> value = load_lanes_of(z + l, lanes);
          store_lanes_of(row + l, n_.gate == RouterGate::kGmm ? value * scales[first + i] : gelu<A>(value), lanes);
        });
        b.pack_rows(i, row);
      }
      for (std::int64_t i = count; i < round_up(count, kAlign); ++i) b.template pack_rows<A>(i, nullptr);
    };
    weight_gradient(n_.num_tokens, grad_logits_, n_.hidden_dim, n_.weight_dtype, n_.num_segments, p_.grad_segments,
                    n_.num_rows, pack);
  }

  const RouteTopKBackwardParams& p_;
  const RouterGateParams& n_;
  bool hidden_layer_, wants_experts_, wants_input_weight_;
  std::int64_t num_tiles_, num_chunks_, inner_;
  TransposedChunks<Op> grad_inner_;
  TransposedChunks<A> grad_logits_;
  AlignedBuffer<A> bias_sums_;
};

}  // namespace

Status route_topk_backward(const RouteTopKBackwardParams& p) {
  const RouterGateParams& n = p.network;
  if (n.gate == RouterGate::kLinear && are_few(n)) {
    n.x_dtype == DType::kFloat64 ? backward_few<double>(p) : backward_few<float>(p);
  } else {
    with_operand(n, [&](auto operand) { Backward<decltype(operand)>(p).run(); });
  }
  return {};
}

}  // namespace mfx::MFX_ISA
