// setp, set and testp (PTX ISA, "Comparison and Selection Instructions").
#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"

namespace cudasim {
namespace {

enum Cmp : uint8_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANQ, CmpBad };
Cmp parseCmp(const std::string& s, bool flt) {
  static const std::map<std::string, Cmp> t = {{"eq", EQ},   {"ne", NE},   {"lt", LT},   {"le", LE},   {"gt", GT},
                                               {"ge", GE},   {"lo", LT},   {"ls", LE},   {"hi", GT},   {"hs", GE},
                                               {"equ", EQU}, {"neu", NEU}, {"ltu", LTU}, {"leu", LEU}, {"gtu", GTU},
                                               {"geu", GEU}, {"num", NUM}, {"nan", NANQ}};
  auto it = t.find(s);
  if (it == t.end() || (!flt && it->second > GE)) return CmpBad;
  return it->second;
}
template <Cmp C, class T>
inline bool compare(T a, T b) {
  bool un = a != a || b != b;
  switch (C) {
    case EQ: return a == b;
    case NE: return a != b && !un;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return un || a == b;
    case NEU: return a != b;
    case LTU: return !(a >= b);
    case LEU: return !(a > b);
    case GTU: return !(a <= b);
    case GEU: return !(a < b);
    case NUM: return !un;
    default: return un;
  }
}

using MaskFn = uint32_t (*)(Warp&, const Operand&, const Operand&, bool ftz);
template <Cmp C, class T>
uint32_t maskOf(Warp& w, const Operand& a, const Operand& b, bool) {
  return cmpMask(w.reg<T>(a), w.reg<T>(b), [](T x, T y) { return compare<C>(x, y); });
}
template <Cmp C>
uint32_t maskF32(Warp& w, const Operand& a, const Operand& b, bool ftz) {
  if (ftz)
    return cmpMask(w.reg<float>(a), w.reg<float>(b),
                   [](float x, float y) { return compare<C>(flushF32(x), flushF32(y)); });
  return cmpMask(w.reg<float>(a), w.reg<float>(b), [](float x, float y) { return compare<C>(x, y); });
}
// Half types compare as f32; `Half` selects the half of a packed pair.
template <Cmp C, bool Bf, int Stride, int Half>
uint32_t maskHalf(Warp& w, const Operand& a, const Operand& b, bool) {
  const uint16_t *x = w.reg<uint16_t>(a), *y = w.reg<uint16_t>(b);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) {
    uint16_t p = x[i * Stride + Half], q = y[i * Stride + Half];
    bool v = Bf ? compare<C>(bf16ToF32(p), bf16ToF32(q)) : compare<C>(f16ToF32(p), f16ToF32(q));
    r |= v ? 1u << i : 0;
  }
  return r;
}

template <Cmp C>
MaskFn pickInt(Ty t) {
  switch (t) {
    case Ty::U16:
    case Ty::B16: return maskOf<C, uint16_t>;
    case Ty::S16: return maskOf<C, int16_t>;
    case Ty::U32:
    case Ty::B32: return maskOf<C, uint32_t>;
    case Ty::S32: return maskOf<C, int32_t>;
    case Ty::U64:
    case Ty::B64: return maskOf<C, uint64_t>;
    case Ty::S64: return maskOf<C, int64_t>;
    default: return nullptr;
  }
}
template <Cmp C>
MaskFn pickFloat(Ty t, int half) {
  switch (t) {
    case Ty::F32: return maskF32<C>;
    case Ty::F64: return maskOf<C, double>;
    case Ty::F16: return maskHalf<C, false, 1, 0>;
    case Ty::BF16: return maskHalf<C, true, 1, 0>;
    case Ty::F16x2: return half ? maskHalf<C, false, 2, 1> : maskHalf<C, false, 2, 0>;
    case Ty::BF16x2: return half ? maskHalf<C, true, 2, 1> : maskHalf<C, true, 2, 0>;
    default: return nullptr;
  }
}
MaskFn pick(Cmp c, Ty t, int half) {
  if (!tyIsFloat(t)) {
    switch (c) {
      case EQ: return pickInt<EQ>(t);
      case NE: return pickInt<NE>(t);
      case LT: return pickInt<LT>(t);
      case LE: return pickInt<LE>(t);
      case GT: return pickInt<GT>(t);
      case GE: return pickInt<GE>(t);
      default: return nullptr;
    }
  }
  switch (c) {
    case EQ: return pickFloat<EQ>(t, half);
    case NE: return pickFloat<NE>(t, half);
    case LT: return pickFloat<LT>(t, half);
    case LE: return pickFloat<LE>(t, half);
    case GT: return pickFloat<GT>(t, half);
    case GE: return pickFloat<GE>(t, half);
    case EQU: return pickFloat<EQU>(t, half);
    case NEU: return pickFloat<NEU>(t, half);
    case LTU: return pickFloat<LTU>(t, half);
    case LEU: return pickFloat<LEU>(t, half);
    case GTU: return pickFloat<GTU>(t, half);
    case GEU: return pickFloat<GEU>(t, half);
    case NUM: return pickFloat<NUM>(t, half);
    case NANQ: return pickFloat<NANQ>(t, half);
    default: return nullptr;
  }
}

uint32_t combine(int op, uint32_t a, uint32_t b) {
  return op == 1 ? a & b : op == 2 ? a | b : op == 3 ? a ^ b : a;
}

// op: p, q, a, b, c. sub: boolean operator, sub2: ftz, sub3: packed halves.
void setpH(Warp& w, const Inst& I) {
  uint32_t r = ((MaskFn)I.aux)(w, I.op[2], I.op[3], I.sub2);
  uint32_t c = I.sub ? w.pred(I.op[4]) : 0;
  if (I.sub3) {  // packed: p and q take one half each
    uint32_t r1 = ((MaskFn)I.imm)(w, I.op[2], I.op[3], I.sub2);
    w.setPred(I.op[0], combine(I.sub, r, c));
    w.setPred(I.op[1], combine(I.sub, r1, c));
    return;
  }
  w.setPred(I.op[0], combine(I.sub, r, c));
  if (I.op[1].present) w.setPred(I.op[1], combine(I.sub, ~r, c));
}
void decodeCompare(Decoder& d, Cmp& c, uint8_t& boolop) {
  c = CmpBad;
  boolop = 0;
  bool flt = tyIsFloat(d.type());
  for (size_t i = 1; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    if (parseCmp(s, flt) != CmpBad)
      c = parseCmp(s, flt);
    else if (s == "and")
      boolop = 1;
    else if (s == "or")
      boolop = 2;
    else if (s == "xor")
      boolop = 3;
    else if (s != "ftz" && parseType(s) == Ty::Bad)
      d.fail("modifier '." + s + "' is not supported");
  }
  if (c == CmpBad) d.fail("unknown comparison");
}
OpcodeEntry eSetp({"setp"}, [](Decoder& d) {
  Cmp c;
  uint8_t boolop;
  decodeCompare(d, c, boolop);
  Ty t = d.type();
  MaskFn f = pick(c, t, 0);
  if (!f) d.fail("type not supported by setp");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), e, p, q;
  if (boolop) e = d.predSrc(d.arg(3));
  if (d.arg(0).pipe) {
    p = d.predDst(d.arg(0).list[0]);
    q = d.predDst(d.arg(0).list[1]);
  } else
    p = d.predDst(d.arg(0));
  bool ftz = d.has("ftz"), packed = t == Ty::F16x2 || t == Ty::BF16x2;
  Inst& in = d.emit(setpH, Cls::Int, {p, q, a, b, e});
  in.aux = (const void*)f;
  in.sub = boolop;
  in.sub2 = ftz;
  in.sub3 = packed;
  if (packed) in.imm = (int64_t)pick(c, t, 1);
  if (tyIsFloat(t)) in.cls = t == Ty::F32 ? Cls::Fp32 : t == Ty::F64 ? Cls::Fp64 : Cls::Fp16;
});

// set: all ones / zero for integers, 1.0 / 0.0 for floating-point results.
void setH(Warp& w, const Inst& I) {
  uint32_t r = combine(I.sub, ((MaskFn)I.aux)(w, I.op[2], I.op[3], I.sub2), I.sub ? w.pred(I.op[4]) : 0);
  uint32_t r1 = I.sub3 ? combine(I.sub, ((MaskFn)I.imm)(w, I.op[2], I.op[3], I.sub2), I.sub ? w.pred(I.op[4]) : 0) : 0;
  const uint32_t one = (uint32_t)I.imm2;
  eachLane(w.m, [&](int i) {
    uint32_t v = r >> i & 1 ? one : 0;
    if (I.sub3) v = (v & 0xffff) | (r1 >> i & 1 ? (one & 0xffff) << 16 : 0);
    if (I.op[0].width == 2)
      w.reg<uint16_t>(I.op[0])[i] = (uint16_t)v;
    else
      w.reg<uint32_t>(I.op[0])[i] = v;
  });
}
OpcodeEntry eSet({"set"}, [](Decoder& d) {
  Cmp c;
  uint8_t boolop;
  decodeCompare(d, c, boolop);
  Ty st = d.type(0), dt = d.type(1);
  MaskFn f = pick(c, st, 0);
  if (!f) d.fail("type not supported by set");
  Operand a = d.src(d.arg(1), st), b = d.src(d.arg(2), st), e;
  if (boolop) e = d.predSrc(d.arg(3));
  bool ftz = d.has("ftz"), packed = st == Ty::F16x2 || st == Ty::BF16x2;
  Operand dst = d.dst(d.arg(0), dt);
  Inst& in = d.emit(setH, Cls::Int, {dst, Operand(), a, b, e});
  in.aux = (const void*)f;
  in.sub = boolop;
  in.sub2 = ftz;
  in.sub3 = packed;
  if (packed) in.imm = (int64_t)pick(c, st, 1);
  in.imm2 = dt == Ty::F32                        ? 0x3f800000
            : dt == Ty::F16 || dt == Ty::F16x2   ? 0x3c00
            : dt == Ty::BF16 || dt == Ty::BF16x2 ? 0x3f80
                                                 : 0xffffffff;
});

void testpH(Warp& w, const Inst& I) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) {
    int cls;
    if (I.sub2)
      cls = std::fpclassify(w.reg<double>(I.op[1])[i]);
    else
      cls = std::fpclassify(w.reg<float>(I.op[1])[i]);
    bool v = false;
    switch (I.sub) {
      case 0: v = cls != FP_NAN && cls != FP_INFINITE; break;
      case 1: v = cls == FP_INFINITE; break;
      case 2: v = cls != FP_NAN; break;
      case 3: v = cls == FP_NAN; break;
      case 4: v = cls == FP_NORMAL || cls == FP_ZERO; break;
      case 5: v = cls == FP_SUBNORMAL; break;
    }
    r |= v ? 1u << i : 0;
  }
  w.setPred(I.op[0], r);
}
OpcodeEntry eTestp({"testp"}, [](Decoder& d) {
  d.allow({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t);
  Inst& in = d.emit(testpH, Cls::Fp32, {d.predDst(d.arg(0)), a});
  in.sub = d.has("finite")       ? 0
           : d.has("infinite")   ? 1
           : d.has("number")     ? 2
           : d.has("notanumber") ? 3
           : d.has("normal")     ? 4
                                 : 5;
  in.sub2 = t == Ty::F64;
});

}  // namespace
}  // namespace cudasim
