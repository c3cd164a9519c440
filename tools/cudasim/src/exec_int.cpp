// Integer, logic, shift, comparison and data-movement instructions (PTX ISA,
// "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic",
// "Logic and Shift Instructions", "Comparison and Selection Instructions").
#include <algorithm>
#include <type_traits>

#include "decoder.h"
#include "lanes.h"

namespace cudasim {
namespace {

template <class T, class F>
void unary(Warp& w, const Inst& I) {
  map1<T, T>(w, I, F());
}
template <class T, class F>
void binary(Warp& w, const Inst& I) {
  map2<T, T, T>(w, I, F());
}
template <class T, class F>
void ternary(Warp& w, const Inst& I) {
  map3<T, T, T, T>(w, I, F());
}

// Picks the instantiation for a type; signedness matters only where S differs.
#define PICK8(T_, H, F)                                   \
  ((T_) == Ty::U16 || (T_) == Ty::B16   ? &H<uint16_t, F> \
   : (T_) == Ty::S16                    ? &H<int16_t, F>  \
   : (T_) == Ty::U32 || (T_) == Ty::B32 ? &H<uint32_t, F> \
   : (T_) == Ty::S32                    ? &H<int32_t, F>  \
   : (T_) == Ty::U64 || (T_) == Ty::B64 ? &H<uint64_t, F> \
   : (T_) == Ty::S64                    ? &H<int64_t, F>  \
                                        : (Handler) nullptr)

template <class T>
using Uns = std::make_unsigned_t<T>;
template <class T>
T wrapMul(T a, T b) {
  return (T)((uint64_t)(std::make_unsigned_t<T>)a * (std::make_unsigned_t<T>)b);
}
template <class T>
T mulHi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed<T>::value, __int128, unsigned __int128>;
    return (T)(((W)a * (W)b) >> 64);
  } else {
    using W = std::conditional_t<std::is_signed<T>::value, int64_t, uint64_t>;
    return (T)(((W)a * (W)b) >> (8 * sizeof(T)));
  }
}
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return (T)((Uns<T>)a + (Uns<T>)b);
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return (T)((Uns<T>)a - (Uns<T>)b);
  }
};
struct MulLo {
  template <class T>
  T operator()(T a, T b) const {
    return wrapMul(a, b);
  }
};
struct MulHi {
  template <class T>
  T operator()(T a, T b) const {
    return mulHi(a, b);
  }
};
struct MadLo {
  template <class T>
  T operator()(T a, T b, T c) const {
    return (T)((Uns<T>)wrapMul(a, b) + (Uns<T>)c);
  }
};
struct MadHi {
  template <class T>
  T operator()(T a, T b, T c) const {
    return (T)((Uns<T>)mulHi(a, b) + (Uns<T>)c);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct MinRelu {
  template <class T>
  T operator()(T a, T b) const {
    T r = a < b ? a : b;
    return r > 0 ? r : 0;
  }
};
struct MaxRelu {
  template <class T>
  T operator()(T a, T b) const {
    T r = a > b ? a : b;
    return r > 0 ? r : 0;
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return (T)(0 - (Uns<T>)a);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? (T)(0 - (Uns<T>)a) : a;
  }
};
// Division by zero yields all ones; the quotient of the smallest negative
// number and -1 wraps. Neither may trap on the host.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return (T) ~(T)0;
    if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (Uns<T>)a);
    return (T)(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed<T>::value && b == (T)-1) return 0;
    return (T)(a % b);
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return (T)((Uns<T>)c + (a < b ? (Uns<T>)b - (Uns<T>)a : (Uns<T>)a - (Uns<T>)b));
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return (T)~a;
  }
};
struct CNot {
  template <class T>
  T operator()(T a) const {
    return a == 0 ? 1 : 0;
  }
};

template <class W, class T>
void mulWide(Warp& w, const Inst& I) {
  map2<W, T, T>(w, I, [](T a, T b) { return (W)((W)a * (W)b); });
}
template <class W, class T>
void madWide(Warp& w, const Inst& I) {
  map3<W, T, T, W>(
      w, I, [](T a, T b, W c) { return (W)((std::make_unsigned_t<W>)((W)a * (W)b) + (std::make_unsigned_t<W>)c); });
}
Handler wideHandler(Ty t, bool mad) {
  switch (t) {
    case Ty::U16: return mad ? madWide<uint32_t, uint16_t> : mulWide<uint32_t, uint16_t>;
    case Ty::S16: return mad ? madWide<int32_t, int16_t> : mulWide<int32_t, int16_t>;
    case Ty::U32: return mad ? madWide<uint64_t, uint32_t> : mulWide<uint64_t, uint32_t>;
    case Ty::S32: return mad ? madWide<int64_t, int32_t> : mulWide<int64_t, int32_t>;
    default: return nullptr;
  }
}
Ty wider(Ty t) {
  return t == Ty::U16 ? Ty::U32 : t == Ty::S16 ? Ty::S32 : t == Ty::U32 ? Ty::U64 : Ty::S64;
}

void emit2(Decoder& d, Handler h, Ty t, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
  d.emit(h, c, {d.dst(d.arg(0), t), a, b});
}
void emit3(Decoder& d, Handler h, Ty t, Ty tc, Ty td, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), e = d.src(d.arg(3), tc);
  d.emit(h, c, {d.dst(d.arg(0), td), a, b, e});
}
void emit1(Decoder& d, Handler h, Ty t, Ty td, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t);
  d.emit(h, c, {d.dst(d.arg(0), td), a});
}

// add.sat.s32 clamps; carry forms keep CC.CF in a register of their own.
void addSat(Warp& w, const Inst& I) {
  map2<int32_t, int32_t, int32_t>(w, I, [](int32_t a, int32_t b) {
    int64_t r = (int64_t)a + b;
    return (int32_t)std::min<int64_t>(std::max<int64_t>(r, INT32_MIN), INT32_MAX);
  });
}
void subSat(Warp& w, const Inst& I) {
  map2<int32_t, int32_t, int32_t>(w, I, [](int32_t a, int32_t b) {
    int64_t r = (int64_t)a - b;
    return (int32_t)std::min<int64_t>(std::max<int64_t>(r, INT32_MIN), INT32_MAX);
  });
}
// op[1] = carry register; sub: bit0 carry in, bit1 carry out; sub2: 0 add 1 sub 2 mad.lo 3 mad.hi
template <class T>
void carryOp(Warp& w, const Inst& I) {
  using W = unsigned __int128;
  const int bits = 8 * sizeof(T);
  T* d = w.reg<T>(I.op[0]);
  uint32_t* cc = w.reg<uint32_t>(I.op[1]);
  const T *a = w.reg<T>(I.op[2]), *b = w.reg<T>(I.op[3]);
  const T* c = I.nops > 4 ? w.reg<T>(I.op[4]) : nullptr;
  eachLane(w.m, [&](int i) {
    T x = a[i], y = b[i];
    unsigned cin = I.sub & 1 ? cc[i] & 1 : 0, cout;
    T r;
    if (I.sub2 == 1) {
      W v = (W)x - (W)y - cin;
      r = (T)v;
      cout = (v >> bits) & 1;
    } else {
      if (I.sub2 >= 2) {
        W p = I.sub4 ? (W)((__int128)(std::make_signed_t<T>)x * (std::make_signed_t<T>)y) : (W)x * y;
        x = I.sub2 == 2 ? (T)p : (T)(p >> bits);
        y = c[i];
      }
      W v = (W)x + (W)y + cin;
      r = (T)v;
      cout = (v >> bits) & 1;
    }
    d[i] = r;
    if (I.sub & 2) cc[i] = cout;
  });
}
std::map<const PtxFunction*, Operand>& carryRegs() {
  static thread_local std::map<const PtxFunction*, Operand> m;
  return m;
}
void decodeCarry(Decoder& d, int kind) {
  Ty t = d.type();
  static thread_local Decoder* owner = nullptr;
  if (owner != &d) {
    carryRegs().clear();
    owner = &d;
  }
  auto it = carryRegs().find(d.fn);
  if (it == carryRegs().end() || d.p == &d.fn->insts[0]) {
    Operand cc = d.temp(4);
    d.pin(cc);
    it = carryRegs().insert_or_assign(d.fn, cc).first;
  }
  std::string root = d.p->op[0];
  bool in = root == "addc" || root == "subc" || root == "madc", out = d.has("cc");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
  Handler h = tySize(t) == 8 ? &carryOp<uint64_t> : tySize(t) == 4 ? &carryOp<uint32_t> : nullptr;
  if (!h) d.fail("type not supported");
  Operand c;
  if (kind >= 2) c = d.src(d.arg(3), t);
  Operand dst = d.dst(d.arg(0), t);
  Inst& i = kind >= 2 ? d.emit(h, Cls::Int, {dst, it->second, a, b, c}) : d.emit(h, Cls::Int, {dst, it->second, a, b});
  i.sub = (in ? 1 : 0) | (out ? 2 : 0);
  i.sub2 = (uint8_t)kind;
  i.sub4 = tyIsSigned(t);
}

}  // namespace

void decodeFloatArith(Decoder& d);  // exec_float.cpp
void decodeFloatUnary(Decoder& d);
void decodeFloatMinMax(Decoder& d);

namespace {

OpcodeEntry eAddSub({"add", "sub"}, [](Decoder& d) {
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatArith(d);
  d.allow({"cc", "sat"});
  bool sub = d.p->op[0] == "sub";
  if (d.has("cc")) return decodeCarry(d, sub);
  if (d.has("sat")) return emit2(d, sub ? subSat : addSat, t);
  emit2(d, sub ? PICK8(t, binary, Sub) : PICK8(t, binary, Add), t);
});
OpcodeEntry eAddc({"addc"}, [](Decoder& d) { decodeCarry(d, 0); });
OpcodeEntry eSubc({"subc"}, [](Decoder& d) { decodeCarry(d, 1); });
OpcodeEntry eMul({"mul"}, [](Decoder& d) {
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatArith(d);
  d.allow({"lo", "hi", "wide"});
  if (d.has("wide")) {
    Handler h = wideHandler(t, false);
    if (!h) d.fail("type not supported");
    Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
    d.emit(h, Cls::Int, {d.dst(d.arg(0), wider(t)), a, b});
  } else if (d.has("hi")) {
    emit2(d, PICK8(t, binary, MulHi), t);
  } else {
    emit2(d, PICK8(t, binary, MulLo), t);
  }
});
OpcodeEntry eMad({"mad"}, [](Decoder& d) {
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatArith(d);
  d.allow({"lo", "hi", "wide", "cc"});
  if (d.has("cc")) return decodeCarry(d, d.has("hi") ? 3 : 2);
  if (d.has("wide")) return emit3(d, wideHandler(t, true), t, wider(t), wider(t));
  emit3(d, d.has("hi") ? PICK8(t, ternary, MadHi) : PICK8(t, ternary, MadLo), t, t, t);
});
OpcodeEntry eMadc({"madc"}, [](Decoder& d) { decodeCarry(d, d.has("hi") ? 3 : 2); });
template <class T, class Hi>
T mul24(T a, T b) {
  int64_t x, y;
  if (std::is_signed<T>::value) {
    x = (int32_t)((uint32_t)a << 8) >> 8;
    y = (int32_t)((uint32_t)b << 8) >> 8;
  } else {
    x = a & 0xffffff;
    y = b & 0xffffff;
  }
  return (T)((x * y) >> (Hi::value ? 16 : 0));
}
template <class T, class Hi>
void mul24Handler(Warp& w, const Inst& I) {
  if (I.nops == 3)
    map2<T, T, T>(w, I, [](T a, T b) { return mul24<T, Hi>(a, b); });
  else
    map3<T, T, T, T>(w, I, [](T a, T b, T c) { return (T)((Uns<T>)mul24<T, Hi>(a, b) + (Uns<T>)c); });
}
OpcodeEntry eMul24({"mul24", "mad24"}, [](Decoder& d) {
  d.allow({"lo", "hi"});
  Ty t = d.type();
  bool hi = d.has("hi"), s = t == Ty::S32;
  Handler h = s ? (hi ? mul24Handler<int32_t, std::true_type> : mul24Handler<int32_t, std::false_type>)
                : (hi ? mul24Handler<uint32_t, std::true_type> : mul24Handler<uint32_t, std::false_type>);
  if (d.nargs() == 3)
    emit2(d, h, t);
  else
    emit3(d, h, t, t, t);
});
OpcodeEntry eDiv({"div", "rem"}, [](Decoder& d) {
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatArith(d);
  d.allow({});
  emit2(d, d.p->op[0] == "div" ? PICK8(t, binary, Div) : PICK8(t, binary, Rem), t);
});
OpcodeEntry eSad({"sad"}, [](Decoder& d) {
  Ty t = d.type();
  emit3(d, PICK8(t, ternary, Sad), t, t, t);
});
template <class T, class F>
void packed16(Warp& w, const Inst& I) {
  map2<uint32_t, uint32_t, uint32_t>(w, I, [](uint32_t a, uint32_t b) {
    F f;
    return (uint32_t)(uint16_t)f((T)a, (T)b) | (uint32_t)(uint16_t)f((T)(a >> 16), (T)(b >> 16)) << 16;
  });
}
OpcodeEntry eMinMax({"min", "max"}, [](Decoder& d) {
  bool mn = d.p->op[0] == "min";
  const std::string& last = d.p->op.back();
  if (last == "u16x2" || last == "s16x2") {
    Handler h = last[0] == 'u'  ? (mn ? packed16<uint16_t, Min> : packed16<uint16_t, Max>)
                : d.has("relu") ? (mn ? packed16<int16_t, MinRelu> : packed16<int16_t, MaxRelu>)
                                : (mn ? packed16<int16_t, Min> : packed16<int16_t, Max>);
    return emit2(d, h, Ty::B32);
  }
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatMinMax(d);
  d.allow({"relu"});
  if (d.has("relu")) return emit2(d, mn ? binary<int32_t, MinRelu> : binary<int32_t, MaxRelu>, t);
  emit2(d, mn ? PICK8(t, binary, Min) : PICK8(t, binary, Max), t);
});
OpcodeEntry eNegAbs({"neg", "abs"}, [](Decoder& d) {
  Ty t = d.type();
  if (tyIsFloat(t)) return decodeFloatUnary(d);
  d.allow({});
  emit1(d, d.p->op[0] == "neg" ? PICK8(t, unary, Neg) : PICK8(t, unary, Abs), t, t);
});

// --- bit counting and fields
template <class T>
int leadingZeros(T v) {
  return v == 0 ? 8 * (int)sizeof(T) : sizeof(T) == 8 ? __builtin_clzll(v) : __builtin_clz((uint32_t)v);
}
template <class T>
void popcH(Warp& w, const Inst& I) {
  map1<uint32_t, T>(w, I, [](T a) { return (uint32_t)__builtin_popcountll(a); });
}
template <class T>
void clzH(Warp& w, const Inst& I) {
  map1<uint32_t, T>(w, I, [](T a) { return (uint32_t)leadingZeros(a); });
}
template <class T>
void bfindH(Warp& w, const Inst& I) {
  bool shift = I.sub;
  map1<uint32_t, T>(w, I, [shift](T a) {
    using U = Uns<T>;
    U v = (U)a;
    if (std::is_signed<T>::value && a < 0) v = (U)~v;
    if (v == 0) return ~0u;
    uint32_t pos = 8 * sizeof(T) - 1 - leadingZeros<U>(v);
    return shift ? (uint32_t)(8 * sizeof(T) - 1 - pos) : pos;
  });
}
template <class T>
T reverseBits(T v) {
  T r = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); i++) r |= ((v >> i) & 1) << (8 * sizeof(T) - 1 - i);
  return r;
}
template <class T>
void brevH(Warp& w, const Inst& I) {
  map1<T, T>(w, I, reverseBits<T>);
}
OpcodeEntry ePopc({"popc"}, [](Decoder& d) {
  Ty t = d.type();
  emit1(d, tySize(t) == 8 ? popcH<uint64_t> : popcH<uint32_t>, t, Ty::U32);
});
OpcodeEntry eClz({"clz"}, [](Decoder& d) {
  Ty t = d.type();
  emit1(d, tySize(t) == 8 ? clzH<uint64_t> : clzH<uint32_t>, t, Ty::U32);
});
OpcodeEntry eBrev({"brev"}, [](Decoder& d) {
  Ty t = d.type();
  emit1(d, tySize(t) == 8 ? brevH<uint64_t> : brevH<uint32_t>, t, t);
});
OpcodeEntry eBfind({"bfind"}, [](Decoder& d) {
  d.allow({"shiftamt"});
  Ty t = d.type();
  Handler h = t == Ty::U32   ? bfindH<uint32_t>
              : t == Ty::S32 ? bfindH<int32_t>
              : t == Ty::U64 ? bfindH<uint64_t>
                             : bfindH<int64_t>;
  bool s = d.has("shiftamt");
  emit1(d, h, t, Ty::U32);
  d.kernel().code.back().sub = s;
});
void fnsH(Warp& w, const Inst& I) {
  map3<uint32_t, uint32_t, uint32_t, int32_t>(w, I, [](uint32_t mask, uint32_t base, int32_t off) -> uint32_t {
    if (off == 0) return base < 32 && (mask >> base & 1) ? base : ~0u;
    int n = off < 0 ? -off : off, step = off < 0 ? -1 : 1;
    for (int64_t b = base; b >= 0 && b < 32; b += step)
      if (mask >> b & 1)
        if (--n == 0) return (uint32_t)b;
    return ~0u;
  });
}
OpcodeEntry eFns({"fns"}, [](Decoder& d) { emit3(d, fnsH, Ty::B32, Ty::S32, Ty::B32); });

template <class T>
void bfeH(Warp& w, const Inst& I) {
  map3<T, T, uint32_t, uint32_t>(w, I, [](T a, uint32_t pos, uint32_t len) -> T {
    const uint32_t bits = 8 * sizeof(T);
    pos &= 0xff;
    len &= 0xff;
    if (len == 0) return 0;
    uint32_t msb = std::min(pos + len - 1, bits - 1);
    bool sign = std::is_signed<T>::value && ((Uns<T>)a >> msb & 1);
    Uns<T> r = 0;
    for (uint32_t i = 0; i < bits; i++) {
      bool bit = i < len && pos + i < bits ? (Uns<T>)a >> (pos + i) & 1 : sign;
      r |= (Uns<T>)bit << i;
    }
    return (T)r;
  });
}
OpcodeEntry eBfe({"bfe"}, [](Decoder& d) {
  Ty t = d.type();
  Handler h = t == Ty::U32   ? bfeH<uint32_t>
              : t == Ty::S32 ? bfeH<int32_t>
              : t == Ty::U64 ? bfeH<uint64_t>
              : t == Ty::S64 ? bfeH<int64_t>
                             : nullptr;
  if (!h) d.fail("type not supported");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), Ty::U32), c = d.src(d.arg(3), Ty::U32);
  d.emit(h, Cls::Int, {d.dst(d.arg(0), t), a, b, c});
});
template <class T>
void bfiH(Warp& w, const Inst& I) {
  T* d = w.reg<T>(I.op[0]);
  const T *a = w.reg<T>(I.op[1]), *b = w.reg<T>(I.op[2]);
  const uint32_t *c = w.reg<uint32_t>(I.op[3]), *e = w.reg<uint32_t>(I.op[4]);
  const uint32_t bits = 8 * sizeof(T);
  eachLane(w.m, [&](int i) {
    uint32_t pos = c[i] & 0xff, len = e[i] & 0xff;
    T r = b[i];
    for (uint32_t k = 0; k < len && pos + k < bits; k++)
      r = (r & ~((T)1 << (pos + k))) | ((a[i] >> k & 1) << (pos + k));
    d[i] = r;
  });
}
OpcodeEntry eBfi({"bfi"}, [](Decoder& d) {
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), c = d.src(d.arg(3), Ty::U32), e = d.src(d.arg(4), Ty::U32);
  d.emit(tySize(t) == 8 ? bfiH<uint64_t> : bfiH<uint32_t>, Cls::Int, {d.dst(d.arg(0), t), a, b, c, e});
});
void bmskH(Warp& w, const Inst& I) {
  bool clamp = I.sub;
  map2<uint32_t, uint32_t, uint32_t>(w, I, [clamp](uint32_t pos, uint32_t len) -> uint32_t {
    if (!clamp) {
      pos &= 31;
      len &= 31;
    }
    if (pos >= 32) return 0;
    uint64_t m = len >= 32 ? 0xffffffffull : (1ull << len) - 1;
    return (uint32_t)(m << pos);
  });
}
OpcodeEntry eBmsk({"bmsk"}, [](Decoder& d) {
  bool c = d.has("clamp");
  emit2(d, bmskH, Ty::B32);
  d.kernel().code.back().sub = c;
});
void szextH(Warp& w, const Inst& I) {
  bool clamp = I.sub, sgn = I.sub2;
  map2<uint32_t, uint32_t, uint32_t>(w, I, [=](uint32_t a, uint32_t n) -> uint32_t {
    if (!clamp) n &= 31;
    if (n >= 32) return a;
    if (n == 0) return 0;
    uint32_t mask = (1u << n) - 1, v = a & mask;
    return sgn && (a >> (n - 1) & 1) ? v | ~mask : v;
  });
}
OpcodeEntry eSzext({"szext"}, [](Decoder& d) {
  bool c = d.has("clamp"), s = d.type() == Ty::S32;
  emit2(d, szextH, Ty::B32);
  d.kernel().code.back().sub = c;
  d.kernel().code.back().sub2 = s;
});

template <class A, class B>
void dp4aH(Warp& w, const Inst& I) {
  map3<int32_t, uint32_t, uint32_t, int32_t>(w, I, [](uint32_t a, uint32_t b, int32_t c) {
    uint32_t s = (uint32_t)c;
    for (int k = 0; k < 4; k++) s += (uint32_t)((int32_t)(A)(a >> 8 * k) * (int32_t)(B)(b >> 8 * k));
    return (int32_t)s;
  });
}
template <class A, class B, int Hi>
void dp2aH(Warp& w, const Inst& I) {
  map3<int32_t, uint32_t, uint32_t, int32_t>(w, I, [](uint32_t a, uint32_t b, int32_t c) {
    uint32_t s = (uint32_t)c;
    for (int k = 0; k < 2; k++) s += (uint32_t)((int32_t)(A)(a >> 16 * k) * (int32_t)(B)(b >> (8 * k + 16 * Hi)));
    return (int32_t)s;
  });
}
OpcodeEntry eDp4a({"dp4a"}, [](Decoder& d) {
  bool a = d.type(1) == Ty::S32, b = d.type(0) == Ty::S32;
  emit3(
      d,
      a ? (b ? dp4aH<int8_t, int8_t> : dp4aH<int8_t, uint8_t>) : (b ? dp4aH<uint8_t, int8_t> : dp4aH<uint8_t, uint8_t>),
      Ty::B32, Ty::B32, Ty::B32);
});
OpcodeEntry eDp2a({"dp2a"}, [](Decoder& d) {
  d.allow({"lo", "hi"});
  bool a = d.type(1) == Ty::S32, b = d.type(0) == Ty::S32, hi = d.has("hi");
  Handler h = hi ? (a ? (b ? dp2aH<int16_t, int8_t, 1> : dp2aH<int16_t, uint8_t, 1>)
                      : (b ? dp2aH<uint16_t, int8_t, 1> : dp2aH<uint16_t, uint8_t, 1>))
                 : (a ? (b ? dp2aH<int16_t, int8_t, 0> : dp2aH<int16_t, uint8_t, 0>)
                      : (b ? dp2aH<uint16_t, int8_t, 0> : dp2aH<uint16_t, uint8_t, 0>));
  emit3(d, h, Ty::B32, Ty::B32, Ty::B32);
});

// --- logic
template <int Op>
void predLogic(Warp& w, const Inst& I) {
  uint32_t a = w.pred(I.op[1]), b = Op < 3 ? w.pred(I.op[2]) : 0;
  w.setPred(I.op[0], Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : ~a);
}
OpcodeEntry eLogic({"and", "or", "xor"}, [](Decoder& d) {
  d.allow({});
  Ty t = d.type();
  char o = d.p->op[0][0];
  if (t == Ty::Pred) {
    Operand a = d.predSrc(d.arg(1)), b = d.predSrc(d.arg(2));
    d.emit(o == 'a' ? predLogic<0> : o == 'o' ? predLogic<1> : predLogic<2>, Cls::Int, {d.predDst(d.arg(0)), a, b});
    return;
  }
  emit2(d, o == 'a' ? PICK8(t, binary, And) : o == 'o' ? PICK8(t, binary, Or) : PICK8(t, binary, Xor), t);
});
OpcodeEntry eNot({"not", "cnot"}, [](Decoder& d) {
  d.allow({});
  Ty t = d.type();
  if (t == Ty::Pred) {
    Operand a = d.predSrc(d.arg(1));
    d.emit(predLogic<3>, Cls::Int, {d.predDst(d.arg(0)), a});
    return;
  }
  emit1(d, d.p->op[0] == "not" ? PICK8(t, unary, Not) : PICK8(t, unary, CNot), t, t);
});
// op: d, a, b, c. sub: lookup table.
void lop3H(Warp& w, const Inst& I) {
  const int lut = I.sub;
  uint32_t t[8];
  for (int k = 0; k < 8; k++) t[k] = lut >> k & 1 ? ~0u : 0;
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, I, [&](uint32_t a, uint32_t b, uint32_t c) {
    return (t[7] & a & b & c) | (t[6] & a & b & ~c) | (t[5] & a & ~b & c) | (t[4] & a & ~b & ~c) | (t[3] & ~a & b & c) |
           (t[2] & ~a & b & ~c) | (t[1] & ~a & ~b & c) | (t[0] & ~a & ~b & ~c);
  });
}
// And p = (d != 0) and / or q. op: d, a, b, c, p, q. sub2: and.
void lop3PredH(Warp& w, const Inst& I) {
  lop3H(w, I);
  const uint32_t* d = w.reg<uint32_t>(I.op[0]);
  uint32_t set = 0;
  eachLane(w.m, [&](int i) { set |= (uint32_t)(d[i] != 0) << i; });
  w.setPred(I.op[4], I.sub2 ? set & w.pred(I.op[5]) : set | w.pred(I.op[5]));
}
OpcodeEntry eLop3({"lop3"}, [](Decoder& d) {
  d.allow({"and", "or"});
  Operand a = d.src(d.arg(1), Ty::B32), b = d.src(d.arg(2), Ty::B32), c = d.src(d.arg(3), Ty::B32);
  if (d.arg(4).kind != PtxOperand::Imm) d.fail("the lookup table must be an immediate");
  uint8_t lut = (uint8_t)d.arg(4).bits;
  if (!d.has("and") && !d.has("or")) {
    d.emit(lop3H, Cls::Int, {d.dst(d.arg(0), Ty::B32), a, b, c}).sub = lut;
    return;
  }
  if (!d.arg(0).pipe) d.fail("lop3 with a boolean operator needs d|p");
  Operand q = d.predSrc(d.arg(5)), x = d.dst(d.arg(0).list[0], Ty::B32), p = d.predDst(d.arg(0).list[1]);
  p.present = true;
  Inst& in = d.emit(lop3PredH, Cls::Int, {x, a, b, c, p, q});
  in.sub = lut;
  in.sub2 = d.has("and");
});

// Shift amounts beyond the width clamp.
template <class T>
void shlH(Warp& w, const Inst& I) {
  map2<T, T, uint32_t>(w, I,
                       [](T a, uint32_t n) { return (T)(n >= 8 * sizeof(T) ? 0 : a << (n & (8 * sizeof(T) - 1))); });
}
template <class T>
void shrH(Warp& w, const Inst& I) {
  const uint32_t top = 8 * sizeof(T) - 1;
  map2<T, T, uint32_t>(w, I, [](T a, uint32_t n) {
    if (std::is_signed<T>::value) return (T)(a >> (n > top ? top : n));
    return (T)(n > top ? 0 : a >> (n & top));
  });
}
OpcodeEntry eShift({"shl", "shr"}, [](Decoder& d) {
  d.allow({});
  Ty t = d.type();
  Handler h;
  if (d.p->op[0] == "shl")
    h = tySize(t) == 8 ? shlH<uint64_t> : tySize(t) == 4 ? shlH<uint32_t> : shlH<uint16_t>;
  else if (tyIsSigned(t))
    h = tySize(t) == 8 ? shrH<int64_t> : tySize(t) == 4 ? shrH<int32_t> : shrH<int16_t>;
  else
    h = tySize(t) == 8 ? shrH<uint64_t> : tySize(t) == 4 ? shrH<uint32_t> : shrH<uint16_t>;
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), Ty::U32);
  if (b.width != 4) d.fail("the shift amount must be a 32-bit register");
  d.emit(h, Cls::Int, {d.dst(d.arg(0), t), a, b});
});
template <bool Left, bool Clamp>
void shfH(Warp& w, const Inst& I) {
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, I, [](uint32_t lo, uint32_t hi, uint32_t n) {
    n = Clamp ? (n > 32 ? 32 : n) : n & 31;
    uint64_t v = (uint64_t)hi << 32 | lo;
    return Left ? (uint32_t)((v << n) >> 32) : (uint32_t)(v >> n);
  });
}
OpcodeEntry eShf({"shf"}, [](Decoder& d) {
  d.allow({"l", "r", "wrap", "clamp"});
  bool l = d.has("l"), c = d.has("clamp");
  emit3(d, l ? (c ? shfH<true, true> : shfH<true, false>) : (c ? shfH<false, true> : shfH<false, false>), Ty::B32,
        Ty::U32, Ty::B32);
});
void prmtH(Warp& w, const Inst& I) {
  const int mode = I.sub;
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, I, [mode](uint32_t a, uint32_t b, uint32_t sel) {
    uint64_t v = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    static const uint8_t f4e[4][4] = {{0, 1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 6}};
    static const uint8_t b4e[4][4] = {{0, 7, 6, 5}, {1, 0, 7, 6}, {2, 1, 0, 7}, {3, 2, 1, 0}};
    static const uint8_t rc8[4] = {0, 1, 2, 3};
    for (int k = 0; k < 4; k++) {
      int s = sel & 3;
      uint32_t n;
      switch (mode) {
        case 0: n = sel >> (4 * k) & 15; break;
        case 1: n = f4e[s][k]; break;
        case 2: n = b4e[s][k]; break;
        case 3: n = rc8[s]; break;
        case 4: n = std::max(s, k); break;               // ecl
        case 5: n = std::min(s, k); break;               // ecr
        default: n = (s >= 2 ? 2 : 0) + (k & 1); break;  // rc16
      }
      if (mode == 6) n = (s & 1 ? 2 : 0) + (k & 1);
      uint32_t byte = v >> (8 * (n & 7)) & 0xff;
      if (mode == 0 && (n & 8)) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * k);
    }
    return r;
  });
}
OpcodeEntry ePrmt({"prmt"}, [](Decoder& d) {
  d.allow({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  uint8_t mode = d.has("f4e")    ? 1
                 : d.has("b4e")  ? 2
                 : d.has("rc8")  ? 3
                 : d.has("ecl")  ? 4
                 : d.has("ecr")  ? 5
                 : d.has("rc16") ? 6
                                 : 0;
  emit3(d, prmtH, Ty::B32, Ty::B32, Ty::B32);
  d.kernel().code.back().sub = mode;
});

}  // namespace
}  // namespace cudasim
