// What the host computes for the CUDA kernels of stick_attention. Plain C++.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "moduleformer_ext/stick_attention.hpp"

namespace mfx {

inline constexpr int kStickTileRows = 64;  // query rows per block of the tiled forward kernel, which exits early as one

// Tiles of a batch whose sequences have `tokens` each, in total where it is packed. Of packed sequences, whose lengths
// only the device knows, sequence i takes the slots from floor(rows before it / tile_rows) + i on: they suffice, since
// ceil(n / m) <= floor((before + n) / m) - floor(before / m) + 1. A slot that is left over does nothing.
inline std::int64_t stick_tile_slots(const StickAttentionProblem& p, std::int64_t rows, int tile_rows) {
  if (p.cu_seqlens_q != nullptr) return p.sequences == 0 ? 0 : rows / tile_rows + p.sequences;
  return p.sequences * ((rows + tile_rows - 1) / tile_rows);
}

// What the kernels' 32-bit counters of rows and keys hold. A row of a K/V head is (position, query head of its group).
inline bool stick_fits(const StickAttentionProblem& p) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 4096;
  return p.tokens_q * p.group <= kMost && p.tokens_k <= kMost;
}

// What a launcher says where rows are not aligned.
inline constexpr const char* kStickSlow =
    "rows of a tensor do not begin at multiples of 16 bytes and are read or written element by element";

// Whether 16-byte chunks of all rows are aligned, so that they can be copied whole.
inline bool stick_aligned(const void* base, std::int64_t element_bytes, std::initializer_list<std::int64_t> strides) {
  bool aligned = reinterpret_cast<std::uintptr_t>(base) % 16 == 0;
  for (const std::int64_t stride : strides) aligned = aligned && stride * element_bytes % 16 == 0;
  return aligned;
}
inline bool stick_aligned(const void* base, std::int64_t element_bytes, const StickQueryStrides& s) {
  return stick_aligned(base, element_bytes, {s.batch, s.token, s.head, s.group});
}
inline bool stick_aligned(const void* base, std::int64_t element_bytes, const StickKeyStrides& s) {
  return stick_aligned(base, element_bytes, {s.batch, s.token, s.head});
}

}  // namespace mfx
