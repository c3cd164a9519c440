// Floating-point arithmetic (PTX ISA, "Floating-Point Instructions" and
// "Half Precision Floating-Point Instructions").
#include <type_traits>

#include "approximate.h"
#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"
#include "rounding.h"

namespace cudasim {
namespace {

// NaN results are the canonical NaN of the format.
inline float canon(float r) {
  return r != r ? floatOf(0x7fffffffu) : r;
}
inline double canon(double r) {
  return r != r ? doubleOf(0x7fffffffffffffffull) : r;
}

enum Op { ADD, SUB, MUL, DIV, FMA, SQRT };
template <int O, class T>
inline T arith(T a, T b, T c) {
  switch (O) {
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case FMA: return std::is_same<T, float>::value ? __builtin_fmaf(a, b, c) : __builtin_fma(a, b, c);
    default: return std::is_same<T, float>::value ? __builtin_sqrtf(a) : __builtin_sqrt(a);
  }
}
template <int O, bool Ftz, bool Sat>
void f32H(Warp& w, const Inst& I) {
  auto in = [](float x) { return Ftz ? flushF32(x) : x; };
  auto out = [](float r) {
    r = canon(r);
    if (Ftz) r = flushF32(r);
    return Sat ? saturateF32(r) : r;
  };
  if (O == FMA)
    map3<float, float, float, float>(w, I,
                                     [&](float a, float b, float c) { return out(arith<O>(in(a), in(b), in(c))); });
  else if (O == SQRT)
    map1<float, float>(w, I, [&](float a) { return out(arith<O>(in(a), 0.f, 0.f)); });
  else
    map2<float, float, float>(w, I, [&](float a, float b) { return out(arith<O>(in(a), in(b), 0.f)); });
}
template <int O>
void f64H(Warp& w, const Inst& I) {
  if (O == FMA)
    map3<double, double, double, double>(w, I, [](double a, double b, double c) { return canon(arith<O>(a, b, c)); });
  else if (O == SQRT)
    map1<double, double>(w, I, [](double a) { return canon(arith<O>(a, 0., 0.)); });
  else
    map2<double, double, double>(w, I, [](double a, double b) { return canon(arith<O>(a, b, 0.)); });
}
template <int O>
Handler pickF32(bool ftz, bool sat) {
  return ftz ? (sat ? f32H<O, true, true> : f32H<O, true, false>)
             : (sat ? f32H<O, false, true> : f32H<O, false, false>);
}
// Directed rounding: sub operation, sub2 mode, sub3 ftz, sub4 sat.
void f32Rounded(Warp& w, const Inst& I) {
  float* d = w.reg<float>(I.op[0]);
  eachLane(w.m, [&](int i) {
    auto in = [&](int k) {
      float x = I.nops > k ? w.reg<float>(I.op[k])[i] : 0.f;
      return I.sub3 ? flushF32(x) : x;
    };
    float r = canon(roundedF32(I.sub, (Round)I.sub2, in(1), in(2), in(3)));
    if (I.sub3) r = flushF32(r);
    d[i] = I.sub4 ? saturateF32(r) : r;
  });
}
void f64Rounded(Warp& w, const Inst& I) {
  double* d = w.reg<double>(I.op[0]);
  eachLane(w.m, [&](int i) {
    auto in = [&](int k) { return I.nops > k ? w.reg<double>(I.op[k])[i] : 0.; };
    d[i] = canon(roundedF64(I.sub, (Round)I.sub2, in(1), in(2), in(3)));
  });
}

// Half formats: computed in binary32/64 such that a single rounding results.
struct F16 {
  static float up(uint16_t h) { return f16ToF32(h); }
  static uint16_t down(float f) { return f32ToF16(f); }
};
struct BF16 {
  static float up(uint16_t h) { return bf16ToF32(h); }
  static uint16_t down(float f) { return f32ToBf16(f); }
};
// sub: bit0 ftz, bit1 sat, bit2 relu
template <class T>
uint16_t finishHalf(float r, int flags) {
  uint16_t h = T::down(r);
  if (flags & 1) h = (h & (std::is_same<T, F16>::value ? 0x7c00 : 0x7f80)) ? h : (uint16_t)(h & 0x8000);
  if (flags & 2) h = T::down(saturateF32(T::up(h)));
  if (flags & 4) {
    float v = T::up(h);
    h = v != v ? h : v > 0 ? h : 0;
  }
  return h;
}
template <class T>
inline float fmaHalf(float a, float b, float c) {
  double s = sumToOdd((double)a * b, c);
  return narrowToOdd(s);
}
template <int O, class T, int PerLane>
void halfH(Warp& w, const Inst& I) {
  const uint16_t *a = w.reg<uint16_t>(I.op[1]), *b = I.nops > 2 ? w.reg<uint16_t>(I.op[2]) : a,
                 *c = I.nops > 3 ? w.reg<uint16_t>(I.op[3]) : a;
  const int flags = I.sub;
  if (O == FMA) {
    mapHalves(w, I, PerLane,
              [=](int i) { return finishHalf<T>(fmaHalf<T>(T::up(a[i]), T::up(b[i]), T::up(c[i])), flags); });
  } else if (std::is_same<T, BF16>::value && (O == ADD || O == SUB)) {
    // The exponent range of bf16 makes a binary32 sum round twice.
    mapHalves(w, I, PerLane, [=](int i) {
      float y = T::up(b[i]);
      return finishHalf<T>(narrowToOdd(sumToOdd(T::up(a[i]), O == SUB ? -y : y)), flags);
    });
  } else if (flags == 0) {
    mapHalves(w, I, PerLane, [=](int i) { return T::down(arith<O>(T::up(a[i]), T::up(b[i]), 0.f)); });
  } else {
    mapHalves(w, I, PerLane, [=](int i) { return finishHalf<T>(arith<O>(T::up(a[i]), T::up(b[i]), 0.f), flags); });
  }
}
template <int O>
Handler pickHalf(Ty t) {
  switch (t) {
    case Ty::F16: return halfH<O, F16, 1>;
    case Ty::F16x2: return halfH<O, F16, 2>;
    case Ty::BF16: return halfH<O, BF16, 1>;
    case Ty::BF16x2: return halfH<O, BF16, 2>;
    default: return nullptr;
  }
}
void f32x2H(Warp& w, const Inst& I) {  // add/mul/fma.f32x2
  float* d = w.reg<float>(I.op[0]);
  eachLane(w.m, [&](int i) {
    for (int k = 2 * i; k < 2 * i + 2; k++) {
      float a = w.reg<float>(I.op[1])[k], b = w.reg<float>(I.op[2])[k], c = I.nops > 3 ? w.reg<float>(I.op[3])[k] : 0;
      d[k] = canon(I.sub == ADD ? a + b : I.sub == SUB ? a - b : I.sub == MUL ? a * b : __builtin_fmaf(a, b, c));
    }
  });
}
void divApproxH(Warp& w, const Inst& I) {  // div.approx and div.full; sub3 ftz, sub4 sat
  const bool ftz = I.sub3, sat = I.sub4, err = config().approxError;
  map2<float, float, float>(w, I, [=](float a, float b) {
    if (ftz) a = flushF32(a), b = flushF32(b);
    float r =
        canon(err ? withinBinary32(Approximate::Div, (double)a / b, b, (uint64_t)bitsOf(a) << 32 | bitsOf(b)) : a / b);
    if (ftz) r = flushF32(r);
    return sat ? saturateF32(r) : r;
  });
}
Round roundMode(Decoder& d) {
  return d.has("rz") ? Round::Zero : d.has("rp") ? Round::Up : d.has("rm") ? Round::Down : Round::Nearest;
}
Cls clsOf(Ty t) {
  return t == Ty::F32 || t == Ty::F32x2 ? Cls::Fp32 : t == Ty::F64 ? Cls::Fp64 : Cls::Fp16;
}

template <int O>
void emitArith(Decoder& d, int nsrc) {
  d.allow({"rn", "rz", "rm", "rp", "ftz", "sat", "relu", "approx", "full"});
  Ty t = d.type();
  bool ftz = d.has("ftz"), sat = d.has("sat");
  Round r = roundMode(d);
  Handler h = nullptr;
  if (t == Ty::F32)
    h = O == DIV && (d.has("approx") || d.has("full")) ? divApproxH
        : r == Round::Nearest                          ? pickF32<O>(ftz, sat)
                                                       : f32Rounded;
  else if (t == Ty::F64)
    h = r == Round::Nearest ? f64H<O> : f64Rounded;
  else if (t == Ty::F32x2)
    h = f32x2H;
  else
    h = pickHalf<O>(t);
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand s[3];
  for (int i = 0; i < nsrc; i++) s[i] = d.src(d.arg(i + 1), t);
  Operand dst = d.dst(d.arg(0), t);
  Inst& in = d.emit(h, clsOf(t), {dst});
  for (int i = 0; i < nsrc; i++) in.op[in.nops++] = s[i];
  in.sub = O;
  if (t != Ty::F32 && t != Ty::F64 && t != Ty::F32x2)
    in.sub = (uint8_t)((ftz ? 1 : 0) | (sat ? 2 : 0) | (d.has("relu") ? 4 : 0));
  in.sub2 = (uint8_t)r;
  in.sub3 = ftz;
  in.sub4 = sat;
}
}  // namespace

void decodeFloatArith(Decoder& d) {
  const std::string& o = d.p->op[0];
  // Mixed precision add/sub/fma: f32 result with a half operand (sm_100) is not covered.
  if (o == "add")
    emitArith<ADD>(d, 2);
  else if (o == "sub")
    emitArith<SUB>(d, 2);
  else if (o == "mul")
    emitArith<MUL>(d, 2);
  else if (o == "div")
    emitArith<DIV>(d, 2);
  else if (o == "mad")
    emitArith<FMA>(d, 3);
  else
    d.fail("unknown instruction '" + d.opcode() + "'");
}
namespace {
OpcodeEntry eFma({"fma"}, [](Decoder& d) { emitArith<FMA>(d, 3); });

// --- neg, abs, copysign: sign-bit operations
template <class T, int K>
void signH(Warp& w, const Inst& I) {
  const T sign = (T)I.imm;
  const bool ftz = I.sub3;
  map1<T, T>(w, I, [=](T a) {
    if (sizeof(T) == 4 && ftz) a = (T)bitsOf(flushF32(floatOf((uint32_t)a)));
    return (T)(K ? a & ~sign : a ^ sign);
  });
}
}  // namespace
void decodeFloatUnary(Decoder& d) {
  d.allow({"ftz"});
  Ty t = d.type();
  bool abs = d.p->op[0] == "abs";
  bool packed = t == Ty::F16x2 || t == Ty::BF16x2;
  int64_t sign = packed         ? 0x80008000ll
                 : t == Ty::F32 ? 0x80000000ll
                 : t == Ty::F64 ? (int64_t)0x8000000000000000ull
                                : 0x8000;
  int n = tySize(t);
  Handler h = n == 8   ? (abs ? signH<uint64_t, 1> : signH<uint64_t, 0>)
              : n == 4 ? (abs ? signH<uint32_t, 1> : signH<uint32_t, 0>)
                       : (abs ? signH<uint16_t, 1> : signH<uint16_t, 0>);
  Operand a = d.src(d.arg(1), t);
  bool ftz = d.has("ftz") && t == Ty::F32;
  Inst& in = d.emit(h, clsOf(t), {d.dst(d.arg(0), t), a});
  in.imm = sign;
  in.sub3 = ftz;
}
namespace {
template <class T>
void copysignH(Warp& w, const Inst& I) {
  const T sign = (T)1 << (8 * sizeof(T) - 1);
  map2<T, T, T>(w, I, [=](T a, T b) { return (T)((a & sign) | (b & ~sign)); });
}
OpcodeEntry eCopysign({"copysign"}, [](Decoder& d) {
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
  d.emit(t == Ty::F64 ? copysignH<uint64_t> : copysignH<uint32_t>, Cls::Fp32, {d.dst(d.arg(0), t), a, b});
});

// --- min, max. flags: 1 max, 2 NaN propagates, 4 ftz, 8 xorsign.abs
template <class T>
inline T minMax(T a, T b, int flags) {
  bool an = a != a, bn = b != b;
  bool neg = false;
  if (flags & 8) {
    neg = std::signbit(a) != std::signbit(b);
    a = std::fabs(a);
    b = std::fabs(b);
  }
  T r;
  if (an || bn) {
    if ((flags & 2) || (an && bn)) return canon((T)NAN);
    r = an ? b : a;
  } else if (a == b) {
    r = (std::signbit(a) != 0) == ((flags & 1) == 0) ? a : b;  // -0 < +0
  } else {
    r = (a < b) == ((flags & 1) == 0) ? a : b;
  }
  return neg ? -r : r;
}
void minMaxF32(Warp& w, const Inst& I) {
  const int f = I.sub;
  if (f <= 1) {
    const bool mx = f;
    map2<float, float, float>(w, I, [mx](float a, float b) {
      float lo = a < b ? a : b, hi = a < b ? b : a;
      float r = mx ? hi : lo;
      uint32_t ua = bitsOf(a), ub = bitsOf(b);
      r = a == b ? floatOf(mx ? ua & ub : ua | ub) : r;  // signed zeros
      r = a != a ? b : r;
      r = b != b ? a : r;
      return canon(r);
    });
    return;
  }
  map2<float, float, float>(w, I, [f](float a, float b) {
    if (f & 4) {
      a = flushF32(a);
      b = flushF32(b);
    }
    return minMax(a, b, f);
  });
}
void minMax3F32(Warp& w, const Inst& I) {
  const int f = I.sub;
  map3<float, float, float, float>(w, I, [f](float a, float b, float c) {
    if (f & 4) {
      a = flushF32(a);
      b = flushF32(b);
      c = flushF32(c);
    }
    return minMax(minMax(a, b, f), c, f);
  });
}
void minMaxF64(Warp& w, const Inst& I) {
  const int f = I.sub;
  map2<double, double, double>(w, I, [f](double a, double b) { return minMax(a, b, f); });
}
template <class T, int PerLane>
void minMaxHalf(Warp& w, const Inst& I) {
  const int f = I.sub;
  const uint16_t *a = w.reg<uint16_t>(I.op[1]), *b = w.reg<uint16_t>(I.op[2]);
  mapHalves(w, I, PerLane, [=](int i) {
    float x = T::up(a[i]), y = T::up(b[i]);
    if ((f & 4) && std::is_same<T, F16>::value) {
      if (!(a[i] & 0x7c00)) x = std::copysign(0.f, x);
      if (!(b[i] & 0x7c00)) y = std::copysign(0.f, y);
    }
    return T::down(minMax(x, y, f));
  });
}
}  // namespace
void decodeFloatMinMax(Decoder& d) {
  d.allow({"ftz", "NaN", "xorsign", "abs"});
  Ty t = d.type();
  uint8_t f = (uint8_t)((d.p->op[0] == "max" ? 1 : 0) | (d.has("NaN") ? 2 : 0) | (d.has("ftz") ? 4 : 0) |
                        (d.has("xorsign") ? 8 : 0));
  Handler h = t == Ty::F32      ? minMaxF32
              : t == Ty::F64    ? minMaxF64
              : t == Ty::F16    ? minMaxHalf<F16, 1>
              : t == Ty::F16x2  ? minMaxHalf<F16, 2>
              : t == Ty::BF16   ? minMaxHalf<BF16, 1>
              : t == Ty::BF16x2 ? minMaxHalf<BF16, 2>
                                : nullptr;
  if (!h) d.fail("type not supported");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
  if (d.nargs() == 4) {  // three-input form
    Operand c = d.src(d.arg(3), t);
    if (t != Ty::F32) d.fail("type not supported");
    d.emit(minMax3F32, clsOf(t), {d.dst(d.arg(0), t), a, b, c}).sub = f;
    return;
  }
  d.emit(h, clsOf(t), {d.dst(d.arg(0), t), a, b}).sub = f;
}
namespace {

// --- special functions. The approximations are computed to full precision,
// which is inside the error bounds of the ISA, unless errors are asked for
// (approximate.cpp); ftz is honoured.
enum Sfu : uint8_t { RCP, RSQRT, SIN, COS, LG2, EX2, TANH, SQRTA };  // the order of Approximate
template <class T>
inline T sfu(int k, T x) {
  switch (k) {
    case RCP: return 1 / x;
    case RSQRT: return (T)(1.0 / std::sqrt((double)x));
    case SIN: return std::sin(x);
    case COS: return std::cos(x);
    case LG2: return std::log2(x);
    case EX2: return std::exp2(x);
    case TANH: return std::tanh(x);
    default: return std::sqrt(x);
  }
}
template <int K>
void sfuH(Warp& w, const Inst& I) {
  const bool ftz = I.sub3, err = I.sub4 && config().approxError;
  map1<float, float>(w, I, [ftz, err](float a) {
    if (ftz) a = flushF32(a);
    float r = canon(err ? withinBinary32((Approximate)K, sfu(K, (double)a), a, bitsOf(a)) : sfu(K, a));
    return ftz ? flushF32(r) : r;
  });
}
void sfuRounded(Warp& w, const Inst& I) {  // rcp and sqrt with a rounding mode
  float* d = w.reg<float>(I.op[0]);
  const float* a = w.reg<float>(I.op[1]);
  eachLane(w.m, [&](int i) {
    float x = I.sub3 ? flushF32(a[i]) : a[i];
    float r =
        canon(I.sub == RCP ? roundedF32(DIV, (Round)I.sub2, 1.f, x, 0) : roundedF32(SQRT, (Round)I.sub2, x, 0, 0));
    d[i] = I.sub3 ? flushF32(r) : r;
  });
}
void sfuF64(Warp& w, const Inst& I) {
  double* d = w.reg<double>(I.op[0]);
  const double* a = w.reg<double>(I.op[1]);
  eachLane(w.m, [&](int i) {
    double x = a[i], r;
    if (I.sub == RCP)
      r = I.sub2 ? roundedF64(DIV, (Round)I.sub2, 1., x, 0) : 1. / x;
    else if (I.sub == RSQRT)
      r = 1. / std::sqrt(x);
    else
      r = I.sub2 ? roundedF64(SQRT, (Round)I.sub2, x, 0, 0) : std::sqrt(x);
    if (I.sub4) r = doubleOf(bitsOf(r) & 0xffffffff00000000ull);  // approx.ftz.f64 keeps 20 mantissa bits
    d[i] = canon(r);
  });
}
template <class T, int PerLane>
void sfuHalf(Warp& w, const Inst& I) {
  const int k = I.sub;
  const bool err = config().approxError, bf16 = std::is_same<T, BF16>::value;
  const uint16_t* a = w.reg<uint16_t>(I.op[1]);
  mapHalves(w, I, PerLane, [=](int i) {
    const float x = T::up(a[i]);
    return T::down(err ? withinHalf((Approximate)k, bf16, sfu(k, (double)x), a[i]) : sfu(k, x));
  });
}
void decodeSfu(Decoder& d, Sfu k) {
  d.allow({"approx", "ftz", "rn", "rz", "rm", "rp"});
  Ty t = d.type();
  Round r = roundMode(d);
  bool approx = d.has("approx"), ftz = d.has("ftz");
  Operand a = d.src(d.arg(1), t), dst = d.dst(d.arg(0), t);
  Handler h = nullptr;
  if (t == Ty::F32) {
    if (r != Round::Nearest && (k == RCP || k == SQRTA))
      h = sfuRounded;
    else
      switch (k) {
        case RCP: h = sfuH<RCP>; break;
        case RSQRT: h = sfuH<RSQRT>; break;
        case SIN: h = sfuH<SIN>; break;
        case COS: h = sfuH<COS>; break;
        case LG2: h = sfuH<LG2>; break;
        case EX2: h = sfuH<EX2>; break;
        case TANH: h = sfuH<TANH>; break;
        case SQRTA: h = sfuH<SQRTA>; break;
      }
  } else if (t == Ty::F64 && (k == RCP || k == RSQRT || k == SQRTA)) {
    h = sfuF64;
  } else if (k == EX2 || k == TANH) {
    h = t == Ty::F16      ? sfuHalf<F16, 1>
        : t == Ty::F16x2  ? sfuHalf<F16, 2>
        : t == Ty::BF16   ? sfuHalf<BF16, 1>
        : t == Ty::BF16x2 ? sfuHalf<BF16, 2>
                          : nullptr;
  }
  if (!h) d.fail("type not supported");
  Inst& in = d.emit(h, Cls::Sfu, {dst, a});
  in.sub = k;
  in.sub2 = (uint8_t)r;
  in.sub3 = ftz;
  in.sub4 = approx && (ftz || t != Ty::F64);
}
OpcodeEntry eRcp({"rcp"}, [](Decoder& d) { decodeSfu(d, RCP); });
OpcodeEntry eRsqrt({"rsqrt"}, [](Decoder& d) { decodeSfu(d, RSQRT); });
OpcodeEntry eSqrt({"sqrt"}, [](Decoder& d) { decodeSfu(d, SQRTA); });
OpcodeEntry eSin({"sin"}, [](Decoder& d) { decodeSfu(d, SIN); });
OpcodeEntry eCos({"cos"}, [](Decoder& d) { decodeSfu(d, COS); });
OpcodeEntry eLg2({"lg2"}, [](Decoder& d) { decodeSfu(d, LG2); });
OpcodeEntry eEx2({"ex2"}, [](Decoder& d) { decodeSfu(d, EX2); });
OpcodeEntry eTanh({"tanh"}, [](Decoder& d) { decodeSfu(d, TANH); });

}  // namespace
}  // namespace cudasim
