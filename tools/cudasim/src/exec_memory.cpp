// ld, st, atom, red, prefetch and the no-op cache controls (PTX ISA, "Data
// Movement and Conversion Instructions", "Parallel Synchronization").
#include <cmath>
#include <mutex>

#include "decoder.h"
#include "exec_memory.h"
#include "float_formats.h"
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
struct B128 {
  uint64_t a, b;
};

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
}  // namespace

void decodeStAsync(Decoder& d);  // async.cpp
void decodeRedAsync(Decoder& d);
void decodeStBulk(Decoder& d);

namespace {
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

// --- atomics
enum AtomOp : uint8_t { AAnd, AOr, AXor, ACas, AExch, AAdd, AInc, ADec, AMin, AMax };
template <class T>
T atomInt(int op, T old, T b, T c) {
  switch (op) {
    case AAnd: return old & b;
    case AOr: return old | b;
    case AXor: return old ^ b;
    case ACas: return old == b ? c : old;
    case AExch: return b;
    case AAdd: return (T)((uint64_t)old + (uint64_t)b);
    case AInc: return old >= b ? 0 : (T)(old + 1);
    case ADec: return old == 0 || old > b ? b : (T)(old - 1);
    case AMin: return old < b ? old : b;
    default: return old > b ? old : b;
  }
}
float minMaxNan(float a, float b, bool mx) {
  return a != a ? b : b != b ? a : mx ? std::fmax(a, b) : std::fmin(a, b);
}
}  // namespace

static std::mutex g_atomicMutex;
static thread_local bool tlHoldsAtomic = false;
AtomicLock::AtomicLock(Warp& w) : locked(w.launch->parallel) {
  if (!locked) return;
  g_atomicMutex.lock();
  tlHoldsAtomic = true;
}
void AtomicLock::abandon() {
  if (tlHoldsAtomic) g_atomicMutex.unlock();
  tlHoldsAtomic = false;
}
AtomicLock::~AtomicLock() {
  if (locked) abandon();
}

// One element; returns the new value.
uint64_t atomElement(int op, Ty t, uint64_t old, uint64_t b, uint64_t c) {
  switch (t) {
    case Ty::F32: return bitsOf(floatOf((uint32_t)old) + floatOf((uint32_t)b));
    case Ty::F64: return bitsOf(doubleOf(old) + doubleOf(b));
    case Ty::F16:
    case Ty::BF16: {
      bool bf = t == Ty::BF16;
      float x = bf ? bf16ToF32((uint16_t)old) : f16ToF32((uint16_t)old),
            y = bf ? bf16ToF32((uint16_t)b) : f16ToF32((uint16_t)b);
      float r = op == AAdd ? narrowToOdd(sumToOdd(x, y)) : minMaxNan(x, y, op == AMax);
      return bf ? f32ToBf16(r) : f32ToF16(r);
    }
    case Ty::F16x2:
    case Ty::BF16x2: {
      Ty e = t == Ty::F16x2 ? Ty::F16 : Ty::BF16;
      return atomElement(op, e, old & 0xffff, b & 0xffff, 0) |
             atomElement(op, e, old >> 16 & 0xffff, b >> 16 & 0xffff, 0) << 16;
    }
    case Ty::S32: return (uint32_t)atomInt<int32_t>(op, (int32_t)old, (int32_t)b, (int32_t)c);
    case Ty::S64: return (uint64_t)atomInt<int64_t>(op, (int64_t)old, (int64_t)b, (int64_t)c);
    case Ty::U64:
    case Ty::B64: return atomInt<uint64_t>(op, old, b, c);
    case Ty::B16:
    case Ty::U16: return atomInt<uint16_t>(op, (uint16_t)old, (uint16_t)b, (uint16_t)c);
    default: return atomInt<uint32_t>(op, (uint32_t)old, (uint32_t)b, (uint32_t)c);
  }
}
int parseAtomOp(Decoder& d) {
  static const std::map<std::string, int> t = {{"and", AAnd},   {"or", AOr},   {"xor", AXor}, {"cas", ACas},
                                               {"exch", AExch}, {"add", AAdd}, {"inc", AInc}, {"dec", ADec},
                                               {"min", AMin},   {"max", AMax}};
  for (size_t i = 1; i < d.p->op.size(); i++) {
    auto it = t.find(d.p->op[i]);
    if (it != t.end()) return it->second;
  }
  d.fail("unknown atomic operation");
}

namespace {
uint64_t getReg(Warp& w, const Operand& o, int i) {
  return o.width == 8 ? w.reg<uint64_t>(o)[i] : o.width == 4 ? w.reg<uint32_t>(o)[i] : w.reg<uint16_t>(o)[i];
}
void putReg(Warp& w, const Operand& o, int i, uint64_t v) {
  if (o.width == 8)
    w.reg<uint64_t>(o)[i] = v;
  else if (o.width == 4)
    w.reg<uint32_t>(o)[i] = (uint32_t)v;
  else
    w.reg<uint16_t>(o)[i] = (uint16_t)v;
}
// op[0] address; ext: n results (absent for red), n values, n compare values.
void atomH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  const int n = I.sub4, es = tySize((Ty)I.sub3);
  Lanes l;
  resolve(w, I, (Space)I.sub, addr, es * n, Access::Atomic, l, false);
  AtomicLock lock(w);
  eachLane(w.m, [&](int i) {
    for (int k = 0; k < n; k++) {
      uint64_t old = 0;
      uint8_t* p = l.p[i] + k * es;
      memcpy(&old, p, es);
      uint64_t b = getReg(w, I.ext[n + k], i), c = I.sub2 == ACas ? getReg(w, I.ext[2 * n + k], i) : 0;
      uint64_t v = atomElement(I.sub2, (Ty)I.sub3, old, b, c);
      memcpy(p, &v, es);
      if (I.ext[k].present) putReg(w, I.ext[k], i, old);
    }
    if (l.sharedMask) syncOnWord(w, addr[i], i, true, true);
  });
  w.st->atomics += __builtin_popcount(w.m);
  w.launch->progress++;
}
// atom.cas/exch.b128
void atom128(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  Lanes l;
  resolve(w, I, (Space)I.sub, addr, 16, Access::Atomic, l, false);
  AtomicLock lock(w);
  eachLane(w.m, [&](int i) {
    B128 old, b = w.reg<B128>(I.ext[1])[i], v = b;
    memcpy(&old, l.p[i], 16);
    if (I.sub2 == ACas) v = old.a == b.a && old.b == b.b ? w.reg<B128>(I.ext[2])[i] : old;
    memcpy(l.p[i], &v, 16);
    if (I.ext[0].present) w.reg<B128>(I.ext[0])[i] = old;
  });
  w.st->atomics += __builtin_popcount(w.m);
  w.launch->progress++;
}
void decodeAtom(Decoder& d, bool red) {
  if (red && d.has("async")) return decodeRedAsync(d);
  int op = parseAtomOp(d);
  for (size_t i = 1; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    static const char* ok[] = {"relaxed", "acquire", "release", "acq_rel", "noftz",       "v2",
                               "v4",      "v8",      "global",  "shared",  "shared::cta", "shared::cluster",
                               "and",     "or",      "xor",     "cas",     "exch",        "add",
                               "inc",     "dec",     "min",     "max"};
    bool good = isCacheModifier(s) || parseType(s) != Ty::Bad;
    for (auto* k : ok) good |= s == k;
    if (!good) d.fail("modifier '." + s + "' is not supported");
  }
  Ty t = d.type();
  if ((t == Ty::F32 || t == Ty::F64) && op != AAdd && op != AExch && op != ACas)
    d.fail("this atomic is not defined for the type");
  if (op == AExch || op == ACas)
    t = tySize(t) == 8 ? Ty::B64 : tySize(t) == 4 ? Ty::B32 : tySize(t) == 16 ? Ty::B128 : Ty::B16;
  size_t a = red ? 0 : 1;
  std::vector<Operand> ext;
  std::vector<Operand> val = elements(d, d.arg(a + 1), t, false);
  size_t n = val.size();
  if (red)
    ext.assign(n, Operand());
  else
    ext = elements(d, d.arg(0), t, true);
  for (auto& v : val) ext.push_back(v);
  if (op == ACas)
    for (auto& v : elements(d, d.arg(a + 2), t, false)) ext.push_back(v);
  int64_t disp;
  Space sp = spaceOf(d);
  Operand base = d.addressBase(d.arg(a), disp, sp);
  Inst& in = d.emit(t == Ty::B128 ? atom128 : atomH, Cls::Atomic, {base});
  in.imm = disp;
  in.sub = (uint8_t)sp;
  in.sub2 = (uint8_t)op;
  in.sub3 = (uint8_t)t;
  in.sub4 = (uint8_t)n;
  d.setExt(in, ext);
}
OpcodeEntry eAtom({"atom"}, [](Decoder& d) { decodeAtom(d, false); });
OpcodeEntry eRed({"red"}, [](Decoder& d) { decodeAtom(d, true); });

// --- instructions without an effect here
void nop(Warp&, const Inst&) {}
OpcodeEntry ePrefetch({"prefetch", "prefetchu", "applypriority", "griddepcontrol", "pmevent", "setmaxnreg"},
                      [](Decoder& d) { d.emit(nop, Cls::Other); });
// discard makes the bytes undefined, which is what it does here too.
void discardH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) { memset(resolveOne(w, Space::None, addr[i], 128, 128, Access::Write, i), 0xff, 128); });
}
OpcodeEntry eDiscard({"discard"}, [](Decoder& d) {
  int64_t disp;
  Operand b = d.addressBase(d.arg(0), disp, Space::None);
  d.emit(discardH, Cls::Other, {b}).imm = disp;
});
void zero64(Warp& w, const Inst& I) {
  uint64_t* d = w.reg<uint64_t>(I.op[0]);
  CUDASIM_LANES((uint64_t)0x12f0000000000000ull);
}
OpcodeEntry ePolicy({"createpolicy"}, [](Decoder& d) { d.emit(zero64, Cls::Other, {d.dst(d.arg(0), Ty::B64)}); });
void yieldH(Warp& w, const Inst&) {
  w.ev = Event::Yield;
}
OpcodeEntry eNanosleep({"nanosleep"}, [](Decoder& d) { d.emit(yieldH, Cls::Other); });
void trapH(Warp& w, const Inst&) {
  throw Fault(kFaultTrap, "trap instruction executed", w.firstLane());
}
OpcodeEntry eTrap({"trap", "brkpt"}, [](Decoder& d) { d.emit(trapH, Cls::Other); });

}  // namespace
}  // namespace cudasim
