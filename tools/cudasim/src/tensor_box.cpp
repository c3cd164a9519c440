#include "tensor_box.h"

namespace cudasim {

uint32_t swizzleOffset(uint32_t addr, int mode) {
  switch (mode) {
    case 1: return addr ^ ((addr >> 3) & 0x10);
    case 2: return addr ^ ((addr >> 3) & 0x30);
    case 3: return addr ^ ((addr >> 3) & 0x70);
    default: return addr;
  }
}
Ty tensorType(int dtype) {
  static const Ty t[] = {Ty::U8,  Ty::U16, Ty::U32,  Ty::S32, Ty::U64, Ty::S64, Ty::F16,
                         Ty::F32, Ty::F64, Ty::BF16, Ty::F32, Ty::F32, Ty::F32};
  return t[dtype];
}

uint32_t boxBytes(const TensorMap& t) {
  uint32_t v = tensorElementBytes(t.dtype);
  for (int i = 0; i < t.rank; i++) v *= i ? (t.box[i] + t.elemStride[i] - 1) / t.elemStride[i] : t.box[0];
  return v;
}

TensorMap readMap(Warp& w, uint64_t addr, int dims, int lane) {
  TensorMap t;
  memcpy(&t, resolveOne(w, Space::None, addr, 128, 64, Access::Read, lane), 128);
  if (t.magic != kTensorMapMagic)
    throw Fault(kFaultIllegalInstruction, "the operand is not a tensor map made by cuTensorMapEncodeTiled", lane);
  if (t.rank != dims)
    throw Fault(kFaultIllegalInstruction, format("a %d-dimensional copy uses a tensor map of rank %d", dims, t.rank),
                lane);
  return t;
}

}  // namespace cudasim
