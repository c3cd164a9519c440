// Reads that software announces. A matrix row is about a page, and hardware prefetchers start anew in every page.
#pragma once

namespace mfx {

// Into the second-level cache: for what is read some thousand bytes from now.
inline void prefetch_far(const void* p) {
  __builtin_prefetch(p, 0, 1);
}

}  // namespace mfx
