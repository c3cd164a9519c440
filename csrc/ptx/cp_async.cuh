// Asynchronous copies from global to shared memory. PTX ISA, "Data movement and conversion instructions: non-bulk
// copy". Of kBytes, `source_bytes` are read and the rest is filled with zeros; with 0 the source is not touched. Both
// sides are aligned to kBytes.
//
// cuda_pipeline_primitives.h takes generic pointers, and the number of bytes through a switch where it is not a
// constant; its commit and wait do not tell the compiler that they concern memory.
#pragma once

#include "ptx/shared_address.cuh"

namespace mfx::device {

template <int kBytes, int kOffset = 0>
__device__ inline void cp_async(SharedAddress to, const void* from, std::uint32_t source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the sizes cp.async has");
  if constexpr (kBytes == 16) {  // around L1: tiles are read once per block
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes),
                 "n"(kOffset)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %4], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(source_bytes), "n"(kOffset)
                 : "memory");
  }
}

__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of the youngest groups of this thread are under way. Others' copies: barrier afterwards.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace mfx::device
