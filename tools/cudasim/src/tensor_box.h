// The rows of a tensor copy's box, and where its bytes lie in shared memory.
#pragma once
#include <algorithm>

#include "machine.h"
#include "ptx_ast.h"
#include "tensor_map.h"

namespace cudasim {

uint32_t swizzleOffset(uint32_t addr, int mode);  // CU_TENSOR_MAP_SWIZZLE: 1 = 32B, 2 = 64B, 3 = 128B
Ty tensorType(int dtype);
uint32_t boxBytes(const TensorMap& t);
TensorMap readMap(Warp& w, uint64_t addr, int dims, int lane);

// Calls row(sharedOffset, globalAddress, validLo, validHi) for each innermost
// row of the box; valid elements are [lo, hi).
template <class F>
void eachRow(const TensorMap& t, const int32_t* coord, F row) {
  const int es = tensorElementBytes(t.dtype);
  uint32_t n[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < t.rank; i++) n[i] = (t.box[i] + t.elemStride[i] - 1) / t.elemStride[i];
  n[0] = t.box[0];  // the innermost element stride only matters for interleaved layouts
  uint32_t off = 0;
  for (uint32_t e = 0; e < n[4]; e++)
    for (uint32_t d = 0; d < n[3]; d++)
      for (uint32_t c = 0; c < n[2]; c++)
        for (uint32_t b = 0; b < n[1]; b++) {
          const uint32_t idx[5] = {0, b, c, d, e};
          bool inside = true;
          int64_t addr = (int64_t)t.address + (int64_t)coord[0] * es;
          for (int i = 1; i < t.rank; i++) {
            int64_t p = (int64_t)coord[i] + (int64_t)idx[i] * t.elemStride[i];
            inside &= p >= 0 && p < (int64_t)t.dim[i];
            addr += p * (int64_t)t.stride[i - 1];
          }
          int64_t lo = std::max<int64_t>(0, -(int64_t)coord[0]),
                  hi = std::min<int64_t>(n[0], (int64_t)t.dim[0] - coord[0]);
          if (!inside || hi < lo) lo = hi = 0;
          row(off, (uint64_t)addr, (uint32_t)lo, (uint32_t)hi);
          off += n[0] * es;
        }
}

}  // namespace cudasim
