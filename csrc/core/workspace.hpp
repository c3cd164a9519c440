// Hands out consecutive arrays of a launcher's workspace; without memory it only adds up the bytes.
#pragma once

#include <cstdint>

namespace mfx {

class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::int64_t count) {
    char* const array = memory_ != nullptr ? memory_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<std::int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(array);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::int64_t kAlignment = 256;
  char* memory_;
  std::int64_t bytes_ = 0;
};

}  // namespace mfx
