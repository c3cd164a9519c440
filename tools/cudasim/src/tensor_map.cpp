#include "tensor_map.h"

#include <cstdio>
#include <cstring>

namespace cudasim {

int tensorElementBytes(int dtype) {
  // u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16 f32ftz tf32 tf32ftz
  static const int b[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return dtype >= 0 && dtype < (int)(sizeof b / sizeof *b) ? b[dtype] : 0;
}

// The checks are those of cuTensorMapEncodeTiled in the driver API manual.
int encodeTensorMap(void* out, int dtype, uint32_t rank, void* address, const uint64_t* dim, const uint64_t* strides,
                    const uint32_t* box, const uint32_t* elemStrides, int interleave, int swizzle, int l2, int oob) {
  const int kInvalid = 1;
  auto bad = [&](const char* why) {
    fprintf(stderr, "cudasim: cuTensorMapEncodeTiled: %s\n", why);
    return kInvalid;
  };
  if (!out || (uintptr_t)out % 64) return bad("the tensor map must be 64-byte aligned");
  int eb = tensorElementBytes(dtype);
  if (!eb) return bad("unknown data type");
  if (rank < 1 || rank > 5) return bad("the rank must be 1..5");
  if (!address || (uintptr_t)address % (interleave == 2 ? 32 : 16))
    return bad("the global address must be 16-byte aligned");
  if (interleave != 0) return bad("interleaved layouts are not supported by the emulator");
  if (swizzle > 3) return bad("this swizzle mode is not supported by the emulator");
  TensorMap m;
  memset(&m, 0, sizeof m);
  m.magic = kTensorMapMagic;
  m.dtype = (uint8_t)dtype;
  m.rank = (uint8_t)rank;
  m.interleave = (uint8_t)interleave;
  m.swizzle = (uint8_t)swizzle;
  m.l2 = (uint8_t)l2;
  m.oobNan = (uint8_t)oob;
  m.address = (uint64_t)address;
  for (uint32_t i = 0; i < rank; i++) {
    if (dim[i] == 0 || dim[i] >= (1ull << 32)) return bad("a dimension is outside 1..2^32-1");
    if (box[i] == 0 || box[i] > 256) return bad("a box dimension is outside 1..256");
    if (elemStrides[i] == 0 || elemStrides[i] > 8) return bad("an element stride is outside 1..8");
    m.dim[i] = (uint32_t)dim[i];
    m.box[i] = (uint16_t)box[i];
    m.elemStride[i] = (uint8_t)elemStrides[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= (1ull << 40))
      return bad("a global stride is not a multiple of 16 or too large");
    m.stride[i - 1] = strides[i - 1];
  }
  uint32_t inner = box[0] * eb;
  if (inner % 16) return bad("the inner box dimension is not a multiple of 16 bytes");
  static const uint32_t span[] = {~0u, 32, 64, 128};
  if (inner > span[swizzle]) return bad("the inner box dimension exceeds the swizzle span");
  memcpy(out, &m, sizeof m);
  return 0;
}

}  // namespace cudasim
