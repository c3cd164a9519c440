// What the scheduler of stick_attention_decode_cpu.cpp asks of the kernels that are compiled per instruction set.
#pragma once

#include "core/isa.hpp"
#include "moduleformer_ext/stick_attention_decode.hpp"

namespace mfx {

// Consecutive keys of one K/V head of one sequence, for all its num_new * group_size query rows.
struct StickDecodeSplit {
  std::int64_t batch, kv_head;
  std::int64_t begin, end;  // keys
};

// Partial result of a split: rows of values (float, double for float64) spaced to whole cache lines, and the stick
// each row has left, when it starts the split with a whole one.
struct StickDecodePart {
  void* out;
  double* remainder;
};

inline std::int64_t stick_decode_row_elements(const StickAttentionDecodeParams& p) {
  return (p.head_dim + 15) / 16 * 16;
}

}  // namespace mfx

// Walks the split from its newest key to its oldest.
MFX_ISA_DECLARE(void stick_decode_split(const StickAttentionDecodeParams& params, const StickDecodeSplit& split,
                                        const StickDecodePart& part))
// (o1, r1) <- (o1 + r1 o2, r1 r2), `older` holding keys that are older than all in `total`.
MFX_ISA_DECLARE(void stick_decode_combine(const StickAttentionDecodeParams& params, const StickDecodePart& total,
                                          const StickDecodePart& older))
// Writes a whole result to out and remainder.
MFX_ISA_DECLARE(void stick_decode_store(const StickAttentionDecodeParams& params, std::int64_t batch,
                                        std::int64_t kv_head, const StickDecodePart& total))
