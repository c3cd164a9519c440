// atom and red (PTX ISA, "Parallel Synchronization and Communication Instructions").
#include <cmath>
#include <map>
#include <mutex>

#include "async.h"
#include "decoder.h"
#include "exec_memory.h"
#include "float_formats.h"
#include "lanes.h"

namespace cudasim {

namespace {
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

}  // namespace
}  // namespace cudasim
