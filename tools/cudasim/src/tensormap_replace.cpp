// tensormap.replace, tensormap.cp_fenceproxy.
#include <map>

#include "bulk_copy.h"

namespace cudasim {

namespace {

enum Field : uint8_t { FAddress, FRank, FBox, FDim, FStride, FElemStride, FType, FInterleave, FSwizzle, FFill };
void replaceH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) {
    TensorMap* t = (TensorMap*)resolveOne(w, (Space)I.sub2, addr[i], 128, 64, Access::Write, i);
    if (t->magic != kTensorMapMagic) {  // zeroed memory is a map whose fields are still to be set
      static const TensorMap zero = {};
      if (memcmp(t, &zero, sizeof zero))
        throw Fault(kFaultIllegalInstruction, "tensormap.replace on memory that holds no tensor map", i);
      t->magic = kTensorMapMagic;
      t->rank = 1;
      for (auto& e : t->elemStride) e = 1;
    }
    uint64_t v = I.op[1].width == 8 ? w.reg<uint64_t>(I.op[1])[i] : w.reg<uint32_t>(I.op[1])[i];
    const int o = (int)I.imm2;
    static const uint8_t types[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};  // PTX order to CUtensorMapDataType
    switch ((Field)I.sub) {
      case FAddress: t->address = v; break;
      case FRank: t->rank = (uint8_t)(v + 1); break;
      case FBox: t->box[o] = (uint16_t)v; break;
      case FDim: t->dim[o] = (uint32_t)v; break;
      case FStride: t->stride[o] = v; break;
      case FElemStride: t->elemStride[o] = (uint8_t)v; break;
      case FType:
        if (v >= sizeof types) throw Fault(kFaultIllegalInstruction, "tensor element type not supported", i);
        t->dtype = types[v];
        break;
      case FInterleave: t->interleave = (uint8_t)v; break;
      case FSwizzle: t->swizzle = (uint8_t)v; break;
      case FFill: t->oobNan = (uint8_t)v; break;
    }
  });
  w.launch->progress++;
}
void copyMapH(Warp& w, const Inst& I) {
  if (!converge(w, ~0u)) return;
  uint64_t dst[32], src[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dst);
  laneAddresses(w, I.op[1], disp[1], src);
  int i = w.firstLane();
  uint8_t* d = resolveOne(w, Space::Global, dst[i], 128, 128, Access::Write, i);
  memcpy(d, resolveOne(w, Space::Shared, plainShared(src[i]), 128, 128, Access::Read, i), 128);
  w.launch->progress++;
}
OpcodeEntry eTensormap({"tensormap"}, [](Decoder& d) {
  if (d.mod(1, "cp_fenceproxy")) {
    int64_t* disp = keepDisps(d);
    Operand a = d.addressBase(d.arg(0), disp[0], Space::Global), b = d.addressBase(d.arg(1), disp[1], Space::Shared);
    d.emit(copyMapH, Cls::Async, {a, b}).imm = (int64_t)disp;
    return;
  }
  static const std::map<std::string, int> fields = {{"global_address", FAddress},
                                                    {"rank", FRank},
                                                    {"box_dim", FBox},
                                                    {"global_dim", FDim},
                                                    {"global_stride", FStride},
                                                    {"element_stride", FElemStride},
                                                    {"elemtype", FType},
                                                    {"interleave_layout", FInterleave},
                                                    {"swizzle_mode", FSwizzle},
                                                    {"fill_mode", FFill}};
  auto it = d.p->op.size() > 3 ? fields.find(d.p->op[3]) : fields.end();
  if (!d.mod(1, "replace") || !d.mod(2, "tile") || it == fields.end()) d.fail("unknown tensormap instruction");
  // The address may be 64-bit although it names shared memory.
  Space sp = d.has("global") ? Space::Global : d.has("shared::cta") ? Space::Shared : Space::None;
  int64_t disp;
  Operand a = d.addressBase(d.arg(0), disp, sp);
  bool ord = d.nargs() == 3;
  Operand v = d.src(d.arg(ord ? 2 : 1), d.has("b64") ? Ty::B64 : Ty::B32);
  Inst& in = d.emit(replaceH, Cls::Async, {a, v});
  in.imm = disp;
  in.imm2 = ord ? (int64_t)d.arg(1).bits : 0;
  in.sub = (uint8_t)it->second;
  in.sub2 = (uint8_t)sp;
});

}  // namespace
}  // namespace cudasim
