// cvt (PTX ISA, "Data Movement and Conversion Instructions: cvt").
#include <algorithm>

#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"
#include "rounding.h"

namespace cudasim {

// --- 8-bit formats
float e4m3ToF32(uint8_t v) {
  int e = v >> 3 & 15, m = v & 7;
  float f = (v & 0x7f) == 0x7f ? NAN : e ? std::ldexp(1.f + m / 8.f, e - 7) : std::ldexp(m / 8.f, -6);
  return v & 0x80 ? -f : f;
}
float e5m2ToF32(uint8_t v) {
  return f16ToF32((uint16_t)v << 8);
}
static uint8_t toFp8(float f, int mant, int bias, uint8_t maxCode, uint8_t nanCode, uint8_t infCode, bool sat) {
  uint8_t sign = std::signbit(f) ? 0x80 : 0;
  if (f != f) return nanCode;
  double a = std::fabs((double)f);
  if (std::isinf(a)) return sign | (sat ? maxCode : infCode);
  int e = a == 0 ? 1 - bias : std::max(std::ilogb(a), 1 - bias);
  double q = std::nearbyint(std::ldexp(a, mant - e));  // units of the last place
  if (q >= std::ldexp(1.0, mant + 1)) {
    e++;
    q /= 2;
  }
  long code = q < std::ldexp(1.0, mant) ? (long)q : ((long)(e + bias) << mant) + (long)q - (1l << mant);
  if (code > maxCode) return sign | (sat ? maxCode : infCode);
  return sign | (uint8_t)code;
}
uint8_t f32ToE4m3(float f, bool sat) {
  return toFp8(f, 3, 7, 0x7e, 0x7f, 0x7f, sat);
}
uint8_t f32ToE5m2(float f, bool sat) {
  return toFp8(f, 2, 15, 0x7b, 0x7f, 0x7c, sat);
}

namespace {

enum class IRound : uint8_t { None, Nearest, Zero, Down, Up };

template <class D>
D toInt(double v, IRound r, bool nanHigh) {
  if (v != v) return nanHigh ? (D)((uint64_t)1 << (8 * sizeof(D) - 1)) : 0;
  switch (r) {
    case IRound::Nearest: v = std::nearbyint(v); break;
    case IRound::Down: v = std::floor(v); break;
    case IRound::Up: v = std::ceil(v); break;
    default: v = std::trunc(v); break;
  }
  const double lo = (double)std::numeric_limits<D>::min();
  const double hi = std::ldexp(1.0, 8 * sizeof(D) - (std::is_signed<D>::value ? 1 : 0));
  if (v < lo) return std::numeric_limits<D>::min();
  if (v >= hi) return std::numeric_limits<D>::max();
  return (D)v;
}
// Writes an integer result into a register that may be wider than the type.
template <class D>
void putInt(Warp& w, const Operand& o, int lane, D v) {
  if (o.width == 8)
    w.reg<uint64_t>(o)[lane] = (uint64_t)(int64_t)v;
  else if (o.width == 4)
    w.reg<uint32_t>(o)[lane] = (uint32_t)(int64_t)v;
  else
    w.reg<uint16_t>(o)[lane] = (uint16_t)v;
}
template <class S>
S getInt(Warp& w, const Operand& o, int lane) {
  if (o.width == 8) return (S)w.reg<uint64_t>(o)[lane];
  if (o.width == 4) return (S)w.reg<uint32_t>(o)[lane];
  return (S)w.reg<uint16_t>(o)[lane];
}

// int -> int. sub: saturate.
template <class D, class S>
void intToInt(Warp& w, const Inst& I) {
  const bool sat = I.sub;
  if (!sat && I.op[0].width == sizeof(D) && I.op[1].width == sizeof(S)) {
    map1<D, S>(w, I, [](S v) { return (D)v; });
    return;
  }
  eachLane(w.m, [&](int i) {
    S v = getInt<S>(w, I.op[1], i);
    D r = (D)v;
    if (sat) {
      __int128 x = v, lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
      r = (D)std::min(std::max(x, lo), hi);
    }
    putInt<D>(w, I.op[0], i, r);
  });
}
template <class D>
Handler intToIntS(Ty s) {
  switch (s) {
    case Ty::U8:
    case Ty::B8: return intToInt<D, uint8_t>;
    case Ty::S8: return intToInt<D, int8_t>;
    case Ty::U16:
    case Ty::B16: return intToInt<D, uint16_t>;
    case Ty::S16: return intToInt<D, int16_t>;
    case Ty::U32:
    case Ty::B32: return intToInt<D, uint32_t>;
    case Ty::S32: return intToInt<D, int32_t>;
    case Ty::U64:
    case Ty::B64: return intToInt<D, uint64_t>;
    case Ty::S64: return intToInt<D, int64_t>;
    default: return nullptr;
  }
}
#define FOR_INT(T_, F)                \
  switch (T_) {                       \
    case Ty::U8:                      \
    case Ty::B8: return F(uint8_t);   \
    case Ty::S8: return F(int8_t);    \
    case Ty::U16:                     \
    case Ty::B16: return F(uint16_t); \
    case Ty::S16: return F(int16_t);  \
    case Ty::U32:                     \
    case Ty::B32: return F(uint32_t); \
    case Ty::S32: return F(int32_t);  \
    case Ty::U64:                     \
    case Ty::B64: return F(uint64_t); \
    case Ty::S64: return F(int64_t);  \
    default: return nullptr;          \
  }
Handler pickIntToInt(Ty dt, Ty st) {
#define F_(D) intToIntS<D>(st)
  FOR_INT(dt, F_)
#undef F_
}

double readFloat(Warp& w, const Operand& o, int lane, Ty t, bool ftz) {
  switch (t) {
    case Ty::F16: return f16ToF32(w.reg<uint16_t>(o)[lane]);
    case Ty::BF16: return bf16ToF32(w.reg<uint16_t>(o)[lane]);
    case Ty::F32:
    case Ty::TF32: {
      float f = w.reg<float>(o)[lane];
      return ftz ? flushF32(f) : f;
    }
    default: return w.reg<double>(o)[lane];
  }
}
// float -> int. sub: rounding, sub2: source type, sub3: ftz.
template <class D>
void floatToInt(Warp& w, const Inst& I) {
  const Ty st = (Ty)I.sub2;
  const IRound r = (IRound)I.sub;
  const bool nanHigh = st == Ty::F64 || sizeof(D) == 8;
  if (st == Ty::F32 && sizeof(D) == 4 && r == IRound::Zero && std::is_signed<D>::value) {
    map1<int32_t, float>(w, I, [](float f) {
      int32_t v = f < 2147483648.f && f >= -2147483648.f ? (int32_t)f : f > 0 ? INT32_MAX : INT32_MIN;
      return f != f ? 0 : v;
    });
    return;
  }
  eachLane(w.m, [&](int i) { putInt<D>(w, I.op[0], i, toInt<D>(readFloat(w, I.op[1], i, st, I.sub3), r, nanHigh)); });
}
Handler pickFloatToInt(Ty dt){
#define F_(D) floatToInt<D>
    FOR_INT(dt, F_)
#undef F_
}

uint16_t truncF16(double v) {  // rz
  if (v != v) return 0x7fff;
  uint16_t h = f32ToF16(narrowToOdd(v));
  if (std::fabs((double)f16ToF32(h)) > std::fabs(v)) h--;
  return h;
}
uint16_t truncBf16(double v) {
  if (v != v) return 0x7fff;
  uint16_t h = (uint16_t)(bitsOf(narrowToOdd(v)) >> 16);
  return h;
}
// One step towards the wanted direction from the truncated value.
uint16_t directedHalf(double v, Round r, bool bf) {
  uint16_t t = bf ? truncBf16(v) : truncF16(v);
  double tv = bf ? bf16ToF32(t) : f16ToF32(t);
  if (v != v || tv == v || r == Round::Zero) return t;
  bool neg = std::signbit(v);
  if ((r == Round::Up && !neg) || (r == Round::Down && neg)) return (uint16_t)(t + 1);
  return t;
}
uint16_t toHalf(double v, Round r, bool bf) {
  if (r != Round::Nearest) return directedHalf(v, r, bf);
  float f = narrowToOdd(v);
  return bf ? f32ToBf16(f) : f32ToF16(f);
}
uint32_t toTf32(float f, int mode) {  // 0 rna, 1 rn, 2 rz
  uint32_t u = bitsOf(f);
  if (f != f) return 0x7fffffff;
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  if (mode == 0)
    u += 0x1000;
  else if (mode == 1)
    u += 0xfff + (u >> 13 & 1);
  return u & ~0x1fffu;
}
// flags: bit0 ftz, bit1 sat, bit2 relu, bit3 satfinite, bit4 integer rounding present
struct CvtInfo {
  Ty d, s;
  Round r;
  IRound ir;
  int flags;
  int tf32;
};

double roundIntegral(double v, IRound r) {
  switch (r) {
    case IRound::Nearest: return std::nearbyint(v);
    case IRound::Zero: return std::trunc(v);
    case IRound::Down: return std::floor(v);
    case IRound::Up: return std::ceil(v);
    default: return v;
  }
}
void writeFloat(Warp& w, const Operand& o, int lane, const CvtInfo& c, double v) {
  if (c.flags & 4) v = v != v ? v : v > 0 ? v : 0.0;
  switch (c.d) {
    case Ty::F16:
    case Ty::BF16: {
      bool bf = c.d == Ty::BF16;
      if (c.flags & 2) v = v > 0 ? (v < 1 ? v : 1) : 0;
      uint16_t h = toHalf(v, c.r, bf);
      if (c.flags & 8) {
        uint16_t inf = bf ? 0x7f80 : 0x7c00;
        if ((h & 0x7fff) == inf) h = (h & 0x8000) | (inf - 1);
      }
      w.reg<uint16_t>(o)[lane] = h;
      return;
    }
    case Ty::F32:
    case Ty::TF32: {
      float f = c.r == Round::Nearest ? (float)v : narrowRounded(v, c.r);
      if (c.flags & 1) f = flushF32(f);
      if (c.flags & 2) f = saturateF32(f);
      w.reg<uint32_t>(o)[lane] = f != f ? 0x7fffffffu : bitsOf(f);
      return;
    }
    default:
      if (c.flags & 2) v = v > 0 ? (v < 1 ? v : 1) : 0;
      w.reg<uint64_t>(o)[lane] = v != v ? 0x7fffffffffffffffull : bitsOf(v);
  }
}
void floatToFloat(Warp& w, const Inst& I) {
  auto& c = *(const CvtInfo*)I.aux;
  if (c.d == Ty::TF32) {
    map1<uint32_t, float>(w, I, [&](float f) {
      if (c.flags & 4) f = f > 0 ? f : f != f ? f : 0.f;
      return toTf32(f, c.tf32);
    });
    return;
  }
  eachLane(w.m, [&](int i) {
    double v = readFloat(w, I.op[1], i, c.s, c.flags & 1);
    writeFloat(w, I.op[0], i, c, roundIntegral(v, c.ir));
  });
}
void f16ToF32H(Warp& w, const Inst& I) {
  map1<float, uint16_t>(w, I, [](uint16_t h) {
    float f = f16ToF32(h);
    return f != f ? floatOf(0x7fffffffu) : f;
  });
}
void bf16ToF32H(Warp& w, const Inst& I) {
  map1<float, uint16_t>(w, I, [](uint16_t h) { return bf16ToF32(h); });
}
void f32ToF16H(Warp& w, const Inst& I) {
  map1<uint16_t, float>(w, I, [](float f) { return f32ToF16(f); });
}
void f32ToBf16H(Warp& w, const Inst& I) {
  map1<uint16_t, float>(w, I, [](float f) { return f32ToBf16(f); });
}

template <class S>
void intToFloat(Warp& w, const Inst& I) {
  auto& c = *(const CvtInfo*)I.aux;
  if (c.d == Ty::F32 && c.r == Round::Nearest && !(c.flags & 2) && I.op[1].width == sizeof(S)) {
    map1<float, S>(w, I, [](S v) { return (float)v; });
    return;
  }
  eachLane(w.m, [&](int i) {
    S v = getInt<S>(w, I.op[1], i);
    const bool sg = std::is_signed<S>::value;
    if (c.d == Ty::F32) {
      float f = sg ? s64ToF32((long long)v, c.r) : u64ToF32((unsigned long long)v, c.r);
      w.reg<float>(I.op[0])[i] = c.flags & 2 ? saturateF32(f) : f;
    } else if (c.d == Ty::F64) {
      w.reg<double>(I.op[0])[i] = sg ? s64ToF64((long long)v, c.r) : u64ToF64((unsigned long long)v, c.r);
    } else {  // through a binary64 with the low bit sticky
      double d = sg ? s64ToF64((long long)v, Round::Zero) : u64ToF64((unsigned long long)v, Round::Zero);
      bool exact = sg ? (__int128)d == (__int128)v : (unsigned __int128)d == (unsigned __int128)v;
      if (!exact) d = doubleOf(bitsOf(d) | 1);
      writeFloat(w, I.op[0], i, c, d);
    }
  });
}
Handler pickIntToFloat(Ty st) {
#define F_(S) intToFloat<S>
  FOR_INT(st, F_)
#undef F_
}

// Two f32 into a packed pair; the first source is the upper half.
void packF32(Warp& w, const Inst& I) {
  auto& c = *(const CvtInfo*)I.aux;
  const float *a = w.reg<float>(I.op[1]), *b = w.reg<float>(I.op[2]);
  if (c.r == Round::Nearest && c.flags == 0 && (c.d == Ty::F16x2 || c.d == Ty::BF16x2)) {
    uint32_t* d = w.reg<uint32_t>(I.op[0]);
    if (c.d == Ty::F16x2)
      CUDASIM_LANES((uint32_t)f32ToF16(a[i]) << 16 | f32ToF16(b[i]));
    else
      CUDASIM_LANES((uint32_t)f32ToBf16(a[i]) << 16 | f32ToBf16(b[i]));
    return;
  }
  eachLane(w.m, [&](int i) {
    uint32_t parts[2];
    for (int k = 0; k < 2; k++) {
      double v = k ? a[i] : b[i];
      if (c.flags & 1) v = flushF32((float)v);
      if (c.flags & 4) v = v != v ? v : v > 0 ? v : 0.0;
      if (c.d == Ty::E4M3x2)
        parts[k] = f32ToE4m3((float)v, true);
      else if (c.d == Ty::E5M2x2)
        parts[k] = f32ToE5m2((float)v, true);
      else {
        bool bf = c.d == Ty::BF16x2;
        uint16_t h = toHalf(v, c.r, bf), inf = bf ? 0x7f80 : 0x7c00;
        if ((c.flags & 8) && (h & 0x7fff) == inf) h = (h & 0x8000) | (inf - 1);
        parts[k] = h;
      }
    }
    if (c.d == Ty::E4M3x2 || c.d == Ty::E5M2x2)
      w.reg<uint16_t>(I.op[0])[i] = (uint16_t)(parts[1] << 8 | parts[0]);
    else
      w.reg<uint32_t>(I.op[0])[i] = parts[1] << 16 | parts[0];
  });
}
void pairToPair(Warp& w, const Inst& I) {  // fp8x2 <-> f16x2
  auto& c = *(const CvtInfo*)I.aux;
  eachLane(w.m, [&](int i) {
    if (c.d == Ty::F16x2) {
      uint16_t v = w.reg<uint16_t>(I.op[1])[i];
      uint32_t r = 0;
      for (int k = 0; k < 2; k++) {
        float f = c.s == Ty::E4M3x2 ? e4m3ToF32((uint8_t)(v >> 8 * k)) : e5m2ToF32((uint8_t)(v >> 8 * k));
        if ((c.flags & 4) && !(f > 0) && f == f) f = 0;
        r |= (uint32_t)f32ToF16(f) << 16 * k;
      }
      w.reg<uint32_t>(I.op[0])[i] = r;
    } else {
      uint32_t v = w.reg<uint32_t>(I.op[1])[i];
      uint16_t r = 0;
      for (int k = 0; k < 2; k++) {
        float f = f16ToF32((uint16_t)(v >> 16 * k));
        if ((c.flags & 4) && !(f > 0) && f == f) f = 0;
        r |= (uint16_t)(c.d == Ty::E4M3x2 ? f32ToE4m3(f, true) : f32ToE5m2(f, true)) << 8 * k;
      }
      w.reg<uint16_t>(I.op[0])[i] = r;
    }
  });
}

void decodeCvt(Decoder& d) {
  d.allow({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "ftz", "sat", "relu", "satfinite"});
  CvtInfo c;
  c.d = d.type(1);
  c.s = d.type(0);
  if (c.d == Ty::Bad) d.fail("cvt needs two types");
  c.r = d.has("rz") ? Round::Zero : d.has("rp") ? Round::Up : d.has("rm") ? Round::Down : Round::Nearest;
  c.ir = d.has("rni")   ? IRound::Nearest
         : d.has("rzi") ? IRound::Zero
         : d.has("rmi") ? IRound::Down
         : d.has("rpi") ? IRound::Up
                        : IRound::None;
  c.flags = (d.has("ftz") ? 1 : 0) | (d.has("sat") ? 2 : 0) | (d.has("relu") ? 4 : 0) | (d.has("satfinite") ? 8 : 0);
  c.tf32 = d.has("rna") ? 0 : d.has("rn") ? 1 : 2;
  auto keep = std::make_shared<CvtInfo>(c);
  d.kernel().auxStore.push_back(keep);
  bool df = tyIsFloat(c.d), sf = tyIsFloat(c.s);
  if (d.nargs() == 3) {
    if (c.s != Ty::F32 || (c.d != Ty::F16x2 && c.d != Ty::BF16x2 && c.d != Ty::E4M3x2 && c.d != Ty::E5M2x2))
      d.fail("unsupported conversion");
    Operand a = d.src(d.arg(1), Ty::F32), b = d.src(d.arg(2), Ty::F32);
    d.emit(packF32, Cls::Cvt, {d.dst(d.arg(0), c.d), a, b}).aux = keep.get();
    return;
  }
  Operand a = d.src(d.arg(1), c.s), dst = d.dst(d.arg(0), c.d);
  Handler h = nullptr;
  bool plain = c.flags == 0 && c.r == Round::Nearest && c.ir == IRound::None;
  if (c.d == Ty::F16x2 || c.s == Ty::F16x2) {
    if (c.s == Ty::E4M3x2 || c.s == Ty::E5M2x2 || c.d == Ty::E4M3x2 || c.d == Ty::E5M2x2) h = pairToPair;
  } else if (df && sf) {
    h = floatToFloat;
    if (c.d == Ty::F32 && c.s == Ty::F16 && !(c.flags & ~1) && c.ir == IRound::None) h = f16ToF32H;
    if (c.d == Ty::F32 && c.s == Ty::BF16 && plain) h = bf16ToF32H;
    if (c.d == Ty::F16 && c.s == Ty::F32 && plain) h = f32ToF16H;
    if (c.d == Ty::BF16 && c.s == Ty::F32 && plain) h = f32ToBf16H;
  } else if (df) {
    h = pickIntToFloat(c.s);
  } else if (sf) {
    h = pickFloatToInt(c.d);
    if (c.ir == IRound::None) c.ir = IRound::Zero;
    Inst& in = d.emit(h, Cls::Cvt, {dst, a});
    in.sub = (uint8_t)c.ir;
    in.sub2 = (uint8_t)c.s;
    in.sub3 = c.flags & 1;
    return;
  } else {
    h = pickIntToInt(c.d, c.s);
  }
  if (!h) d.fail("conversion not supported");
  Inst& in = d.emit(h, Cls::Cvt, {dst, a});
  in.aux = keep.get();
  in.sub = !df && !sf && (c.flags & 2);
}

// cvt.pack: two saturated integers (plus c shifted in for 8 and fewer bits).
void cvtPack(Warp& w, const Inst& I) {
  const int bits = I.sub;
  const bool sgn = I.sub2;
  int64_t lo = sgn ? -(1ll << (bits - 1)) : 0, hi = sgn ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1;
  uint32_t mask = (uint32_t)((1ull << bits) - 1);
  eachLane(w.m, [&](int i) {
    auto sat = [&](int32_t v) { return (uint32_t)std::min(std::max<int64_t>(v, lo), hi) & mask; };
    uint32_t r = sat(w.reg<int32_t>(I.op[1])[i]) << bits | sat(w.reg<int32_t>(I.op[2])[i]);
    if (bits < 16) r |= w.reg<uint32_t>(I.op[3])[i] << (2 * bits);
    w.reg<uint32_t>(I.op[0])[i] = r;
  });
}
}  // namespace
void decodeCvtPack(Decoder& d) {
  Ty t = parseType(d.p->op[d.p->op.size() - (d.nargs() == 4 ? 3 : 2)]);
  Operand a = d.src(d.arg(1), Ty::S32), b = d.src(d.arg(2), Ty::S32), c;
  if (d.nargs() == 4) c = d.src(d.arg(3), Ty::B32);
  Operand dst = d.dst(d.arg(0), Ty::B32);
  Inst& in = d.emit(cvtPack, Cls::Cvt, {dst, a, b, c});
  in.sub = (uint8_t)(t == Ty::S4 || t == Ty::U4 ? 4 : 8 * tySize(t));
  in.sub2 = tyIsSigned(t);
}
namespace {
// cvt.pack shares the opcode name, so the plain decoder hands it over.
OpcodeEntry eCvtAny({"cvt"}, [](Decoder& d) {
  if (d.mod(1, "pack"))
    decodeCvtPack(d);
  else
    decodeCvt(d);
});
}  // namespace
}  // namespace cudasim
