// bf16 products on AMX, the matrix unit of recent Intel processors: what core/brgemm.hpp uses there.
//
// The contract is brgemm's. A call costs nothing beside its arithmetic; oneDNN's kernels through ATen take a table
// lookup and, where shapes alternate, a new tile configuration: as long as a product of 64 x 64 x 64 itself.
#pragma once

#include <cstdint>

#include "moduleformer_ext/common.hpp"

namespace mfx {

// Whether the processor has it and the system lets this process use it; asked once.
bool amx_available();

void amx_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const BFloat16* a, std::int64_t lda, const BFloat16* b,
              std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate);

// The calling thread's tile registers are free, or somebody else's: the next product configures them.
void amx_forget();

// Gives the calling thread's tile registers back.
void amx_release();

}  // namespace mfx
