// Integer arithmetic and comparison instructions (PTX ISA, "Integer
// Arithmetic Instructions", "Extended-Precision Integer Arithmetic").
#include <algorithm>

#include "int_ops.h"

namespace cudasim {
namespace {

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

}  // namespace
}  // namespace cudasim
