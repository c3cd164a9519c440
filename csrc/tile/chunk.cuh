// Chunks: the 16 bytes of 4 or 8 elements.
#pragma once

#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/vector_memory.cuh"

namespace mfx::device {

template <typename T>
__device__ inline void unpack_chunk(const uint4& words, float (&x)[16 / sizeof(T)]) {
  const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else {
      x[2 * i] = low_of_pair<T>(word[i]);
      x[2 * i + 1] = high_of_pair<T>(word[i]);
    }
  }
}

// 16 bytes of a row whose address may have any alignment its element type allows.
template <typename T>
__device__ inline uint4 load_unaligned_chunk(const T* from) {
  if constexpr (sizeof(T) == 4) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(from);
    return {words[0], words[1], words[2], words[3]};
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
    const auto pair = [&](int i) { return halves[2 * i] | std::uint32_t{halves[2 * i + 1]} << 16; };
    return {pair(0), pair(1), pair(2), pair(3)};
  }
}

template <typename T>
__device__ inline void store_unaligned_chunk(T* to, const uint4& x) {
  const std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<std::uint32_t*>(to)[i] = words[i];
    } else {
      reinterpret_cast<std::uint16_t*>(to)[2 * i] = static_cast<std::uint16_t>(words[i]);
      reinterpret_cast<std::uint16_t*>(to)[2 * i + 1] = static_cast<std::uint16_t>(words[i] >> 16);
    }
  }
}

// The elements in the first `bytes` of a chunk at any address of its elements, and zeros.
template <typename T>
__device__ inline uint4 load_partial_chunk(const void* from, int bytes) {
  constexpr int kElements = 16 / sizeof(T);
  union {
    T elements[kElements];
    uint4 words;
  } chunk;
  chunk.words = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i * static_cast<int>(sizeof(T)) < bytes) chunk.elements[i] = static_cast<const T*>(from)[i];
  }
  return chunk.words;
}

// What may be there of a chunk: all elements or none, or the first so many.
enum class Partial : bool { kNever, kMaybe };

// Copies the first `bytes` of a chunk, and zeros, to shared memory, kOffset bytes after `to`: asynchronously where its
// address is `aligned`, a bool or std::bool_constant, else through registers.
template <typename T, Partial kPartial, int kOffset = 0, typename Aligned>
__device__ inline void copy_chunk(SharedAddress to, const void* from, std::uint32_t bytes, Aligned aligned) {
  if (aligned) {
    cp_async<16, kOffset>(to, from, bytes);
  } else if constexpr (kPartial == Partial::kMaybe) {
    store_shared_128(to + kOffset, load_partial_chunk<T>(from, static_cast<int>(bytes)));
  } else {
    store_shared_128(to + kOffset, bytes != 0 ? load_unaligned_chunk(static_cast<const T*>(from)) : uint4{});
  }
}

}  // namespace mfx::device
