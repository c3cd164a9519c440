// Small matrix products on cache-resident tiles: for bf16 our own kernel where there is AMX (core/amx.hpp), for float
// and elsewhere ATen's batch-reduce GEMM (oneDNN micro-kernels).
//
// C[m, n] (+)= A[m, k] B[k, n] with fp32 C. A is row-major. B is row-major for float; for bf16 it is in VNNI order,
// pairs of consecutive k interleaved: B[(k / 2), n, 2], with an odd last row paired with zeros. For bf16, n must be
// 16, 32, 48 or 64 and k even (oneDNN's limits with AMX, kept everywhere so that one path serves all machines).
#pragma once

#include <cstdint>

#include "moduleformer_ext/common.hpp"

namespace mfx {

// Whether this torch and this processor run it; probed once, by computing a small product and checking it.
// For tests: MFX_BRGEMM=0 turns it off, and callers take their own kernels (core/tile_gemm.hpp); MFX_BRGEMM=aten leaves
// bf16 to ATen too.
bool brgemm_available_f32();
bool brgemm_available_bf16();

// Whether torch's dense products of this 16-bit type take several times as long as float32's here: on x86 they do where
// the processor has no instruction for it (2 to 38 times). Elsewhere torch's are taken as they are.
bool slow_in_torch(DType dtype);

void brgemm(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b,
            std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate);
// ldb counts pairs, i.e. columns: consecutive VNNI rows are 2 * ldb elements apart.
void brgemm(std::int64_t m, std::int64_t n, std::int64_t k, const BFloat16* a, std::int64_t lda, const BFloat16* b,
            std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate);

// Gives back the tile registers a thread's bf16 products configured. Destroy at the end of a thread's task.
struct BrgemmScope {
  BrgemmScope() = default;
  BrgemmScope(const BrgemmScope&) = delete;
  BrgemmScope& operator=(const BrgemmScope&) = delete;
  ~BrgemmScope();
};

}  // namespace mfx
