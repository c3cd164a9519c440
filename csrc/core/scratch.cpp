#include "core/scratch.hpp"

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mfx {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kCachedBytes = std::size_t{128} << 20;

std::size_t alignment_for(std::size_t size) {
  return size >= 2 * kHugePage ? kHugePage : 64;
}

struct Block {
  void* data;
  std::size_t capacity;
};

void* allocate(std::size_t capacity) {
  void* data = ::operator new(capacity, std::align_val_t{alignment_for(capacity)});
  advise_huge_pages(data, capacity);
  return data;
}

void release(Block block) {
  ::operator delete(block.data, std::align_val_t{alignment_for(block.capacity)});
}

// Released blocks, most recently used last.
class Cache {
 public:
  ~Cache() {
    for (const Block& block : blocks_) release(block);
  }

  Block take(std::size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = blocks_.end();
      for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
        if (it->capacity >= size && (best == blocks_.end() || it->capacity <= best->capacity)) best = it;
      }
      if (best != blocks_.end()) {
        const Block block = *best;
        blocks_.erase(best);
        bytes_ -= block.capacity;
        return block;
      }
    }
    const std::size_t capacity = (size + 4095) & ~std::size_t{4095};
    return {allocate(capacity), capacity};
  }

  void give(Block block) {
    std::vector<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back(block);
      bytes_ += block.capacity;
      while (bytes_ > kCachedBytes) {
        surplus.push_back(blocks_.front());
        bytes_ -= blocks_.front().capacity;
        blocks_.erase(blocks_.begin());
      }
    }
    for (const Block& old : surplus) release(old);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  std::size_t bytes_ = 0;
};

Cache& cache() {
  static Cache instance;
  return instance;
}

}  // namespace

ScratchBytes::ScratchBytes(std::size_t size) {
  if (size == 0) return;
  const Block block = cache().take(size);
  data_ = block.data;
  capacity_ = block.capacity;
}

ScratchBytes::~ScratchBytes() {
  if (data_ != nullptr) cache().give({data_, capacity_});
}

void* thread_scratch(std::size_t size) {
  struct Free {
    std::size_t capacity = 0;
    void operator()(void* data) const { release({data, capacity}); }
  };
  static thread_local std::unique_ptr<void, Free> buffer;
  if (buffer.get_deleter().capacity < size) {
    buffer.reset();
    const std::size_t capacity = (size + 4095) & ~std::size_t{4095};
    buffer = std::unique_ptr<void, Free>(allocate(capacity), Free{capacity});
  }
  return buffer.get();
}

void advise_huge_pages(void* data, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + size) & ~(kHugePage - 1);
  // Only a hint: whether it is followed changes nothing but the time.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(size);
#endif
}

}  // namespace mfx
