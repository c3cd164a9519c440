// What is indexed by expert and lies in several pieces of memory. Plain data, passed by value as a kernel parameter.
#pragma once

#include <cstdint>

namespace mfx::device {

// At most kMost pieces: kernel parameters are few kilobytes. Launchers refuse more before they append.
template <int kMost_>
struct Segments {
  static constexpr int kMost = kMost_;
  char* data[kMost];          // where each piece begins; null: nothing is wanted there
  std::int32_t first[kMost];  // its first expert, ascending
  std::int32_t count;

  void append(const void* piece, std::int64_t first_expert) {
    data[count] = static_cast<char*>(const_cast<void*>(piece));
    first[count++] = static_cast<std::int32_t>(first_expert);
  }
  // The piece that holds an expert.
  __device__ int find(std::int32_t expert) const {
    int s = count - 1;
    while (first[s] > expert) --s;
    return s;
  }
};

}  // namespace mfx::device
