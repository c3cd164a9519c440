// Our own encoding of a CUtensorMap. The layout is private to the emulator;
// device code only sees it through tensormap.replace and the bulk copies.
#pragma once
#include <cstdint>

namespace cudasim {

struct TensorMap {
  uint32_t magic;
  uint8_t dtype, rank, interleave, swizzle;  // values of the CU_TENSOR_MAP enums
  uint8_t l2, oobNan, pad[2];
  uint32_t reserved;
  uint64_t address;
  uint32_t dim[5];     // extent - 1 would be needed for 2^32; not supported
  uint64_t stride[4];  // bytes, of dimensions 1..4
  uint16_t box[5];
  uint8_t elemStride[5];
  uint8_t tail[29];
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");
constexpr uint32_t kTensorMapMagic = 0x70614d54;
int tensorElementBytes(int dtype);  // 0 when unknown

// Returns a CUresult.
int encodeTensorMap(void* out, int dtype, uint32_t rank, void* address, const uint64_t* dim, const uint64_t* strides,
                    const uint32_t* box, const uint32_t* elemStrides, int interleave, int swizzle, int l2, int oob);

}  // namespace cudasim
