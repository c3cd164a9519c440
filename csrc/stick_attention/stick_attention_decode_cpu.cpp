// Which keys are read, by whom, and in what order the pieces are put together.
//
// The cache of each (sequence, K/V head) is cut into splits from its newest key backwards, at places that depend on
// shapes alone. First every pair's newest split is walked: often the sticks end there. The other splits are handed out
// newest first. Whoever finishes a split adds to the pair's total whatever has become consecutive with it, in order of
// age, and stops the pair where its sticks end, so that no more than a split per thread is read in vain. A split
// beyond that point is dropped even if it was computed: the result does not depend on who was faster.
#include "stick_attention/stick_attention_decode_cpu.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "core/divide.hpp"
#include "core/parallel.hpp"
#include "stick_attention/stick_exhausted.hpp"

namespace mfx {
namespace {

constexpr std::int64_t kFirstSplitKeys = 64;
constexpr std::int64_t kMinSplitKeys = 64, kMaxSplitKeys = 512;
constexpr std::int64_t kSplitBytes = 1 << 17;  // reading this takes several times as long as handing it over

void walk(const StickAttentionDecodeParams& params, const StickDecodeSplit& split, const StickDecodePart& part) {
  MFX_ISA_RETURN(stick_decode_split, params, split, part)
}
void combine(const StickAttentionDecodeParams& params, const StickDecodePart& total, const StickDecodePart& older) {
  MFX_ISA_RETURN(stick_decode_combine, params, total, older)
}
void store(const StickAttentionDecodeParams& params, std::int64_t batch, std::int64_t kv_head,
           const StickDecodePart& total) {
  MFX_ISA_RETURN(stick_decode_store, params, batch, kv_head, total)
}

class Part {
 public:
  explicit Part(const StickAttentionDecodeParams& p)
      : out_(p.num_new * p.group_size * stick_decode_row_elements(p) * (p.dtype == DType::kFloat64 ? 8 : 4)),
        remainder_(p.num_new * p.group_size) {}
  StickDecodePart view() { return {out_.data(), remainder_.data()}; }

 private:
  AlignedBuffer<std::byte> out_;
  AlignedBuffer<double> remainder_;
};

// One K/V head of one sequence.
class HeadWalk {
 public:
  HeadWalk(const StickAttentionDecodeParams& params, std::int64_t batch, std::int64_t kv_head, std::int64_t split_keys)
      : p_(params), batch_(batch), kv_head_(kv_head), split_keys_(split_keys), total_(params) {
    const std::int64_t older = std::max<std::int64_t>(0, p_.lengths[batch] - kFirstSplitKeys);
    pending_.resize(ceil_div(older, split_keys));
  }

  void walk_newest() {
    const std::int64_t length = p_.lengths[batch_];
    walk(p_, {batch_, kv_head_, std::max<std::int64_t>(0, length - kFirstSplitKeys), length}, total_.view());
    ended_ = all_exhausted();
  }

  // Splits older than the newest one, still to be walked.
  std::int64_t num_older() const { return ended_ ? 0 : static_cast<std::int64_t>(pending_.size()); }

  void walk_older(std::int64_t i) {
    if (i >= static_cast<std::int64_t>(pending_.size()) || ended_.load(std::memory_order_relaxed)) return;
    auto part = std::make_unique<Part>(p_);
    const std::int64_t end = p_.lengths[batch_] - kFirstSplitKeys - i * split_keys_;
    walk(p_, {batch_, kv_head_, std::max<std::int64_t>(0, end - split_keys_), end}, part->view());

    const std::lock_guard lock(mutex_);
    pending_[i] = std::move(part);
    for (; !ended_ && next_ < pending_.size() && pending_[next_]; ++next_) {
      combine(p_, total_.view(), pending_[next_]->view());
      pending_[next_].reset();
      ended_ = all_exhausted();
    }
  }

  void write() { store(p_, batch_, kv_head_, total_.view()); }

 private:
  bool all_exhausted() {
    const double* remainder = total_.view().remainder;
    return std::all_of(remainder, remainder + p_.num_new * p_.group_size,
                       [this](double rem) { return exhausted(rem, p_.stick_epsilon); });
  }

  const StickAttentionDecodeParams& p_;
  const std::int64_t batch_, kv_head_, split_keys_;
  Part total_;
  std::atomic<bool> ended_{false};
  std::mutex mutex_;                            // of everything below, and of total_ while older splits are walked
  std::vector<std::unique_ptr<Part>> pending_;  // by age: walked, waiting for a newer one
  std::size_t next_ = 0;
};

}  // namespace

Status stick_attention_decode_cpu(const StickAttentionDecodeParams& params) {
  StickAttentionDecodeParams p = params;
  p.stick_epsilon = exit_epsilon(params.stick_epsilon);  // what the walks compare with
  for (std::int64_t b = 0; b < p.batch; ++b) {
    if (p.lengths[b] < 0 || p.lengths[b] > p.max_keys) {
      return {.message = "cache_lengths must lie in [0, S_max]", .got = p.lengths[b], .index = b};
    }
  }
  if (p.num_new == 0 || p.group_size == 0) return {};

  const std::int64_t key_bytes = p.head_dim * element_size(p.dtype) * (p.k_is_v ? 1 : 2);
  const std::int64_t split_keys = std::clamp(kSplitBytes / key_bytes, kMinSplitKeys, kMaxSplitKeys);
  std::vector<std::unique_ptr<HeadWalk>> heads;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) heads.push_back(std::make_unique<HeadWalk>(p, b, h, split_keys));
  }
  const std::int64_t pairs = static_cast<std::int64_t>(heads.size());

  const std::int64_t pairs_per_thread = std::max<std::int64_t>(1, kParallelBytes / (kFirstSplitKeys * key_bytes));
  parallel_for(pairs, pairs_per_thread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) heads[i]->walk_newest();
  });

  std::vector<HeadWalk*> unfinished;
  std::int64_t splits = 0;
  for (const auto& head : heads) {
    if (head->num_older() > 0) unfinished.push_back(head.get());
    splits = std::max(splits, head->num_older());
  }
  const std::int64_t width = static_cast<std::int64_t>(unfinished.size());
  const std::int64_t readers = readers_of(splits * width * split_keys * key_bytes);
  parallel_tasks(splits * width, readers,
                 [&](std::int64_t task) { unfinished[task % width]->walk_older(task / width); });

  for (const auto& head : heads) head->write();
  return {};
}

}  // namespace mfx
