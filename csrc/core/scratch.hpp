// Scratch memory that outlives the call that asked for it. A fresh mapping costs a page fault per 4 KiB, which for
// workspaces of some MiB per call is as much time as the arithmetic on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace mfx {

// Uninitialised memory on a 64-byte boundary. A few released blocks (128 MiB at most) are kept for the next caller.
class ScratchBytes {
 public:
  ScratchBytes() = default;
  explicit ScratchBytes(std::size_t size);
  ~ScratchBytes();
  ScratchBytes(ScratchBytes&& other) noexcept { *this = std::move(other); }
  ScratchBytes& operator=(ScratchBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::int64_t size) : bytes_(static_cast<std::size_t>(size) * sizeof(T)) {}

  T* data() const { return static_cast<T*>(bytes_.data()); }

 private:
  ScratchBytes bytes_;
};

// Arrays that live as long as this.
class ScratchArrays {
 public:
  template <typename T>
  T* take(std::int64_t size) {
    return static_cast<T*>(blocks_.emplace_back(static_cast<std::size_t>(size) * sizeof(T)).data());
  }

 private:
  std::vector<ScratchBytes> blocks_;
};

// At least `size` bytes that belong to the calling thread until it asks again: for the tiles of one task.
void* thread_scratch(std::size_t size);

// Asks for huge pages under a large allocation that is about to be written for the first time.
void advise_huge_pages(void* data, std::size_t size);

}  // namespace mfx
