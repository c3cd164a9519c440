// What the host computes for the CUDA kernels of stick_attention. Plain C++.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "moduleformer_ext/stick_attention.hpp"

namespace mfx {

inline constexpr int kStickTileRows = 64;  // query rows per block of forward, and per early-exit decision

// Rows of a K/V head are (position, query head of the group): row = position * G + g. Of packed sequences, whose
// lengths only the device knows, sequence i takes the tile slots from floor(rows before it / 64) + i on: they suffice,
// since ceil(n / 64) <= floor((before + n) / 64) - floor(before / 64) + 1. A slot that is left over does nothing.
inline std::int64_t stick_tile_slots(const StickAttentionProblem& p) {
  const std::int64_t rows = p.tokens_q * p.group;
  if (p.cu_seqlens_q != nullptr) return p.sequences == 0 ? 0 : rows / kStickTileRows + p.sequences;
  return p.sequences * ((rows + kStickTileRows - 1) / kStickTileRows);
}

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
