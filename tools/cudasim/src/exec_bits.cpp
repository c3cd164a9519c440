// Instructions on the bits of integers: counts, fields, logic, shifts and
// permutations (PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift
// Instructions").
#include <algorithm>

#include "int_ops.h"

namespace cudasim {
namespace {

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

// --- logic
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
