// ld and st (PTX ISA, "Data Movement and Conversion Instructions").
#include "exec_memory.h"

#include "async.h"
#include "decoder.h"
#include "lanes.h"

namespace cudasim {

void laneAddresses(Warp& w, const Operand& o, int64_t disp, uint64_t* addr) {
  if (o.width == 8) {
    const uint64_t* a = w.reg<uint64_t>(o);
    for (int i = 0; i < 32; i++) addr[i] = a[i] + (uint64_t)disp;
  } else {
    const uint32_t* a = w.reg<uint32_t>(o);
    for (int i = 0; i < 32; i++) addr[i] = (uint32_t)(a[i] + (uint32_t)disp);
  }
}

bool isCacheModifier(const std::string& s) {
  static const char* k[] = {"ca",   "cg",  "cs",      "lu",  "cv",  "wb",   "wt",     "nc",
                            "weak", "cta", "cluster", "gpu", "sys", "mmio", "unified"};
  for (auto* x : k)
    if (s == x) return true;
  return s.rfind("L1::", 0) == 0 || s.rfind("L2::", 0) == 0;
}
Space spaceOf(Decoder& d) {
  for (size_t i = 1; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    if (s == "global") return Space::Global;
    if (s == "shared" || s == "shared::cta" || s == "shared::cluster") return Space::Shared;
    if (s == "local") return Space::Local;
    if (s == "const") return Space::Const;
    if (s == "param" || s == "param::entry" || s == "param::func") return Space::Param;
  }
  return Space::None;
}
Cls memoryClass(Space s) {
  return s == Space::Shared                       ? Cls::LdStShared
         : s == Space::Local                      ? Cls::LdStLocal
         : s == Space::Param || s == Space::Const ? Cls::LdParam
                                                  : Cls::LdStGlobal;
}

// Plain flags in shared memory synchronise when accessed with volatile,
// relaxed, acquire or release semantics.
void syncOnWord(Warp& w, uint64_t addr, int lane, bool acq, bool rel) {
  if (!w.launch->raceOn) return;
  uint32_t off;
  Block* b = sharedTarget(w, addr & ~kWindowMask, 1, lane, off);
  MbarrierSync& s = b->mbarSync[off & ~3u];
  laneSync(w, ~0u);
  if (acq) acquire(w, s.vc, s.proxy);
  if (rel) release(w, s.vc, s.proxy);
}

void shadowStore(Warp& w, const Lanes& l, const uint64_t* addr, uint32_t bytes, int line, const uint8_t* data,
                 uint32_t stride) {
  if (!l.sharedMask || !w.launch->raceOn) return;
  RaceActor a = actorOf(w, line);
  eachLane(l.sharedMask, [&](int i) {
    uint32_t off;
    Block* b = sharedTarget(w, addr[i] & ~kWindowMask, bytes, i, off);
    raceWrite(*b, off, bytes, a, data + i * stride);
    if (w.lanes && b == w.block && memcmp(b->sharedPtr(off), data + i * stride, bytes))
      laneAccess(w, i, off, bytes, line, true);
  });
}

std::vector<Operand> elements(Decoder& d, const PtxOperand& o, Ty t, bool dst) {
  std::vector<Operand> v;
  if (o.kind == PtxOperand::Vector) {
    for (auto& e : o.list) {
      if (dst && e.kind == PtxOperand::Sink)
        v.push_back(Operand());
      else
        v.push_back(dst ? d.dst(e, t) : d.src(e, t));
    }
  } else {
    v.push_back(dst ? d.dst(o, t) : d.src(o, t));
  }
  return v;
}

namespace {

constexpr uint8_t kSyncAccess = 1;

// Plain accesses to global memory, when they are checked for races at all.
bool trackGlobal(Warp& w, const Inst& I, const Lanes& l) {
  return config().raceGlobal && w.launch->raceOn && I.sub2 != kSyncAccess && I.sub == (uint8_t)Space::Global &&
         !l.sharedMask;
}

// op[0] address, ext results. M: type in memory, R: register.
template <class M, class R>
void loadH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  const int n = I.next;
  Lanes l;
  resolve(w, I, (Space)I.sub, addr, sizeof(M) * n, Access::Read, l, I.sub2 != kSyncAccess);
  if (I.sub2 == kSyncAccess && l.sharedMask)
    eachLane(l.sharedMask, [&](int i) { syncOnWord(w, addr[i], i, true, false); });
  if (trackGlobal(w, I, l)) {
    RaceActor a = actorOf(w, I.line);
    eachLane(w.m, [&](int i) { raceGlobal(*w.block, addr[i], sizeof(M) * n, a, false, nullptr); });
  }
  for (int k = 0; k < n; k++) {
    if (!I.ext[k].present) continue;
    R* d = w.reg<R>(I.ext[k]);
    if (w.m == ~0u) {
      for (int i = 0; i < 32; i++) {
        M v;
        memcpy(&v, l.p[i] + k * sizeof(M), sizeof(M));
        d[i] = (R)v;
      }
    } else {
      eachLane(w.m, [&](int i) {
        M v;
        memcpy(&v, l.p[i] + k * sizeof(M), sizeof(M));
        d[i] = (R)v;
      });
    }
  }
}
template <class M, class R>
void storeH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  const int n = I.next;
  Lanes l;
  resolve(w, I, (Space)I.sub, addr, sizeof(M) * n, Access::Write, l);
  if (l.sharedMask) {
    if (I.sub2 == kSyncAccess) {
      eachLane(l.sharedMask, [&](int i) { syncOnWord(w, addr[i], i, false, true); });
    } else if (w.launch->raceOn) {
      uint8_t buf[32][32];
      for (int k = 0; k < n; k++)
        eachLane(w.m, [&](int i) {
          M v = (M)w.reg<R>(I.ext[k])[i];
          memcpy(buf[i] + k * sizeof(M), &v, sizeof(M));
        });
      shadowStore(w, l, addr, sizeof(M) * n, I.line, &buf[0][0], 32);
    }
  }
  if (trackGlobal(w, I, l)) {
    RaceActor a = actorOf(w, I.line);
    eachLane(w.m, [&](int i) {
      uint8_t buf[32];
      for (int k = 0; k < n; k++) {
        M v = (M)w.reg<R>(I.ext[k])[i];
        memcpy(buf + k * sizeof(M), &v, sizeof(M));
      }
      raceGlobal(*w.block, addr[i], sizeof(M) * n, a, true, buf);
    });
  }
  for (int k = 0; k < n; k++) {
    const R* s = w.reg<R>(I.ext[k]);
    eachLane(w.m, [&](int i) {
      M v = (M)s[i];
      memcpy(l.p[i] + k * sizeof(M), &v, sizeof(M));
    });
  }
  if (I.sub2 == kSyncAccess || I.sub == (uint8_t)Space::None || I.sub == (uint8_t)Space::Global ||
      I.sub == (uint8_t)Space::Shared)
    w.launch->progress++;
}

#define PICK_MEM(H)                                                                                                  \
  switch (t) {                                                                                                       \
    case Ty::U8:                                                                                                     \
    case Ty::B8: return rw == 8 ? H<uint8_t, uint64_t> : rw == 4 ? H<uint8_t, uint32_t> : H<uint8_t, uint16_t>;      \
    case Ty::S8: return rw == 8 ? H<int8_t, int64_t> : rw == 4 ? H<int8_t, int32_t> : H<int8_t, int16_t>;            \
    case Ty::S16: return rw == 8 ? H<int16_t, int64_t> : rw == 4 ? H<int16_t, int32_t> : H<int16_t, int16_t>;        \
    case Ty::U16:                                                                                                    \
    case Ty::B16:                                                                                                    \
    case Ty::F16:                                                                                                    \
    case Ty::BF16: return rw == 8 ? H<uint16_t, uint64_t> : rw == 4 ? H<uint16_t, uint32_t> : H<uint16_t, uint16_t>; \
    case Ty::S32: return rw == 8 ? H<int32_t, int64_t> : rw == 4 ? H<int32_t, int32_t> : nullptr;                    \
    case Ty::U32:                                                                                                    \
    case Ty::B32:                                                                                                    \
    case Ty::F32:                                                                                                    \
    case Ty::F16x2:                                                                                                  \
    case Ty::BF16x2: return rw == 8 ? H<uint32_t, uint64_t> : rw == 4 ? H<uint32_t, uint32_t> : nullptr;             \
    case Ty::U64:                                                                                                    \
    case Ty::S64:                                                                                                    \
    case Ty::B64:                                                                                                    \
    case Ty::F64:                                                                                                    \
    case Ty::F32x2: return rw == 8 ? H<uint64_t, uint64_t> : nullptr;                                                \
    case Ty::B128: return rw == 16 ? H<B128, B128> : nullptr;                                                        \
    default: return nullptr;                                                                                         \
  }
Handler pickLoad(Ty t, int rw){PICK_MEM(loadH)} Handler pickStore(Ty t, int rw) {
  PICK_MEM(storeH)
}

// A kernel parameter at a constant offset: the same value for every lane.
template <class R>
void paramH(Warp& w, const Inst& I) {
  const uint8_t* src = w.launch->kernel->paramData + I.imm;
  const int n = I.next, mb = I.sub;
  for (int k = 0; k < n; k++) {
    if (!I.ext[k].present) continue;
    uint64_t v = 0;
    memcpy(&v, src + k * mb, mb);
    if (I.sub2) {
      int sh = 64 - 8 * mb;
      v = (uint64_t)((int64_t)(v << sh) >> sh);
    }
    R* d = w.reg<R>(I.ext[k]);
    const R r = (R)v;
    CUDASIM_LANES(r);
  }
}

bool checkModifiers(Decoder& d) {
  bool sync = false;
  for (size_t i = 1; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    if (s == "volatile" || s == "relaxed" || s == "acquire" || s == "release") {
      sync = true;
      continue;
    }
    if (isCacheModifier(s) || parseType(s) != Ty::Bad || s == "v2" || s == "v4" || s == "v8") continue;
    if (s == "global" || s == "shared" || s == "shared::cta" || s == "shared::cluster" || s == "local" ||
        s == "const" || s == "param" || s == "param::entry" || s == "param::func")
      continue;
    d.fail("modifier '." + s + "' is not supported");
  }
  return sync;
}
int widthOf(const std::vector<Operand>& v) {
  for (auto& o : v)
    if (o.present) return o.width;
  return 8;
}

OpcodeEntry eLd({"ld", "ldu"}, [](Decoder& d) {
  bool sync = checkModifiers(d);
  Ty t = d.type();
  Space sp = spaceOf(d);
  const PtxOperand& a = d.arg(1);
  if (a.kind != PtxOperand::Address) d.fail("expected an address operand");
  std::vector<Operand> res = elements(d, d.arg(0), t, true);
  int rw = widthOf(res);
  for (auto& o : res)
    if (!o.present) o.width = (uint8_t)rw;
  if (sp == Space::Param && d.entryParam(a.list[0])) {
    PtxOperand s = a.list[0];
    Handler h = rw == 8 ? paramH<uint64_t> : rw == 4 ? paramH<uint32_t> : paramH<uint16_t>;
    Inst& in = d.emit(h, Cls::LdParam);
    in.imm = d.paramOffset(d.fn, s.reg) + a.offset;
    in.sub = (uint8_t)tySize(t);
    in.sub2 = tyIsSigned(t) && !tyIsFloat(t);
    if (in.imm + (int64_t)(tySize(t) * res.size()) > (int64_t)d.kernel().paramBytes + 16)
      d.fail("parameter access out of range");
    d.setExt(in, res);
    return;
  }
  int64_t disp;
  Operand base = d.addressBase(a, disp, sp);
  // Constants and kernel parameters are addressed by offsets.
  Space eff = sp == Space::Param && d.fn->isEntry && a.list[0].kind == PtxOperand::Reg ? Space::Const
              : sp == Space::Param                                                     ? Space::Local
                                                                                       : sp;
  if (sp == Space::Const)
    disp += (int64_t)d.module().constBase;
  else if (eff == Space::Const)
    disp += (int64_t)d.kernel().paramData;
  if (eff == Space::Const && base.width == 4) base = d.widen(base);
  Handler h = pickLoad(t, rw);
  if (!h) d.fail("type and register size do not fit");
  Inst& in = d.emit(h, memoryClass(sp), {base});
  in.imm = disp;
  in.sub = (uint8_t)eff;
  in.sub2 = sync ? kSyncAccess : 0;
  d.setExt(in, res);
});

OpcodeEntry eSt({"st"}, [](Decoder& d) {
  if (d.has("async")) return decodeStAsync(d);
  if (d.has("bulk")) return decodeStBulk(d);
  bool sync = checkModifiers(d);
  Ty t = d.type();
  Space sp = spaceOf(d);
  std::vector<Operand> val = elements(d, d.arg(1), t, false);
  int64_t disp;
  Operand base = d.addressBase(d.arg(0), disp, sp);
  Handler h = pickStore(t, widthOf(val));
  if (!h) d.fail("type and register size do not fit");
  Inst& in = d.emit(h, memoryClass(sp), {base});
  in.imm = disp;
  in.sub = (uint8_t)(sp == Space::Param ? Space::Local : sp);
  in.sub2 = sync ? kSyncAccess : 0;
  d.setExt(in, val);
});

}  // namespace
}  // namespace cudasim
