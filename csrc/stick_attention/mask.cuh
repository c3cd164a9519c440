// Which keys the rows of a warp see.
#pragma once

#include "stick_attention/block_info.cuh"
#include "stick_attention/stick_break.cuh"

namespace mfx::stick {

// The keys of a tile that padding leaves, one bit per key, the same in all warps. Loading is apart from using, so that
// other work comes between.
template <int kKeys>
class KeyPadding {
 public:
  using Bits = std::conditional_t<kKeys <= 32, std::uint32_t, std::uint64_t>;

  __device__ KeyPadding(const StickAttentionProblem& p, const Sequence& s)
      : mask_(p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + s.batch * p.tokens_k), keys_(s.keys) {}

  __device__ bool all() const { return mask_ == nullptr; }

  __device__ void load(int first_key) {
    if (mask_ == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int key = first_key + 32 * i + static_cast<int>(threadIdx.x & 31);
      kept_[i] = 32 * i + static_cast<int>(threadIdx.x & 31) < kKeys && key >= 0 && key < keys_ && mask_[key];
    }
  }

  // Of the tile that was loaded last.
  __device__ Bits bits() const {
    if (mask_ == nullptr) return ~Bits{0};
    Bits bits = 0;
#pragma unroll
    for (int i = kWords - 1; i >= 0; --i) bits = bits << 31 << 1 | __ballot_sync(device::kAllLanes, kept_[i]);
    return bits;
  }

  // The same, and loads the tile that is met next.
  __device__ Bits bits(int next_first_key) {
    const Bits kept = bits();
    load(next_first_key);
    return kept;
  }

 private:
  static constexpr int kWords = (kKeys + 31) / 32;
  const bool* mask_;
  int keys_;
  bool kept_[kWords] = {};
};

// The rows of a warp from `first_row` on, kRows per lane and kLanes lanes to each, and tiles of kKeys keys.
template <int kKeys, int kRows = 2, int kLanes = device::kQuad>
class Mask {
 public:
  static constexpr int kWidth = kKeys / 8;
  __device__ static constexpr std::integral_constant<int, kWidth> whole() { return {}; }

  __device__ Mask(const StickAttentionProblem& p, const Sequence& s, int first_row)
      : oldest_(s.newest_key(p, first_row)),
        newest_(s.newest_key(p, min(first_row + kRows * kApart - 1, s.rows - 1))),
        padding_(p, s) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      newest_of_row_[row] = s.newest_key(p, first_row + static_cast<int>(threadIdx.x & 31) / kLanes + kApart * row);
    }
  }

  __device__ void prefetch(int key_tile) { padding_.load(key_tile * kKeys); }

  // Of tile `key_tile`, which was loaded last; loads the older one.
  __device__ void take(int key_tile) { kept_ = padding_.bits((key_tile - 1) * kKeys); }

  // Calls body(width) where the rows see some of a tile, the oldest `width` tiles of 8 keys.
  template <typename Body>
  __device__ void with_visible_width(int key_tile, Body&& body) const {
    const int first_key = key_tile * kKeys;
    if (newest_ >= first_key) stick::with_visible_width<kWidth>(newest_ - first_key, 1, body);
  }

  // The oldest keys of the span from `first_key` on that kernels of sm_80 take: visible_width_keys().
  template <int kSpan>
  __device__ int width_keys(int first_key) const {
    return visible_width_keys<kSpan>(newest_ - first_key);
  }

  // Calls scan(masked, visible), `masked` a constant, false where the rows see all.
  template <typename Width, typename Scan>
  __device__ void apply(int key_tile, Width width, Scan&& scan) const {
    const int first_key = key_tile * kKeys;
    if (width == kWidth && padding_.all() && oldest_ >= first_key + kKeys - 1) {
      scan(std::false_type{}, Visible<kRows>{});
    } else {
      int newest[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) newest[row] = newest_of_row_[row] - first_key;
      scan(std::true_type{}, visible_runs<8 * width / kLanes, kLanes>(newest, kept_));
    }
  }

 private:
  static constexpr int kApart = 32 / kLanes;  // rows of a lane
  int newest_of_row_[kRows];                  // the newest key that they see
  int oldest_, newest_;                       // that of the first row, and of the last
  KeyPadding<kKeys> padding_;
  typename KeyPadding<kKeys>::Bits kept_;
};

// As Mask, of a span of keys that stays while the rows of a warp change.
template <int kSpan, int kRows = 2, int kLanes = device::kQuad>
class SpanMask {
 public:
  static constexpr int kWidth = kSpan / 8;
  __device__ static constexpr std::integral_constant<int, kWidth> whole() { return {}; }

  __device__ SpanMask(const StickAttentionProblem& p, const Sequence& s, int first_key)
      : p_(p),
        s_(s),
        padding_(p, s),
        first_key_(first_key),
        first_row_(s.first_row(p, first_key)),
        group_(static_cast<int>(p.group)) {
    padding_.load(first_key);
    kept_ = padding_.bits();
    device::pin_in_register(first_row_);
  }

  // Whether one of the warp's rows, from `row` on, is there and sees one of the keys.
  __device__ bool any(int row) const { return row < s_.rows && last_row(row) >= first_row_; }

  // Calls body(width) with the oldest `width` tiles of 8 keys that have all they see.
  template <typename Body>
  __device__ void with_visible_width(int row, Body&& body) const {
    stick::with_visible_width<kWidth>(last_row(row) - first_row_, group_, body);
  }

  template <typename Width, typename Scan>
  __device__ void apply(int row, Width width, Scan&& scan) const {
    if (width == kWidth && padding_.all() && row >= first_row_ + (kSpan - 1) * group_ &&
        row + kRows * kApart <= s_.rows) {
      scan(std::false_type{}, Visible<kRows>{});
    } else {
      int newest[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int own = row + static_cast<int>(threadIdx.x & 31) / kLanes + kApart * i;
        newest[i] = own < s_.rows ? s_.newest_key(p_, own) - first_key_ : -1;
      }
      scan(std::true_type{}, visible_runs<8 * width / kLanes, kLanes>(newest, kept_));
    }
  }

 private:
  static constexpr int kApart = 32 / kLanes;  // rows of a lane
  __device__ int last_row(int row) const { return min(row + kRows * kApart, s_.rows) - 1; }

  const StickAttentionProblem& p_;
  const Sequence& s_;
  KeyPadding<kSpan> padding_;
  typename KeyPadding<kSpan>::Bits kept_;
  const int first_key_;
  std::int32_t first_row_;  // that sees it
  const int group_;
};

}  // namespace mfx::stick
