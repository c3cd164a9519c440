// mov, selp, slct, and the address conversions cvta, isspacep, mapa (PTX ISA,
// "Data Movement and Conversion Instructions", "State Spaces").
#include "decoder.h"
#include "lanes.h"
#include "module.h"

namespace cudasim {
namespace {

// --- mov, including packing and unpacking of vectors
template <class T>
void movH(Warp& w, const Inst& I) {
  T* d = w.reg<T>(I.op[0]);
  const T* a = w.reg<T>(I.op[1]);
  if (w.m == ~0u)
    memcpy(d, a, 32 * sizeof(T));
  else
    eachLane(w.m, [&](int i) { d[i] = a[i]; });
}
// A 32-bit source moved to a 64-bit register and the like (shared addresses).
void movConvert(Warp& w, const Inst& I) {
  eachLane(w.m, [&](int i) {
    uint64_t v = I.op[1].width == 8   ? w.reg<uint64_t>(I.op[1])[i]
                 : I.op[1].width == 4 ? w.reg<uint32_t>(I.op[1])[i]
                                      : w.reg<uint16_t>(I.op[1])[i];
    if (I.op[0].width == 8)
      w.reg<uint64_t>(I.op[0])[i] = v;
    else if (I.op[0].width == 4)
      w.reg<uint32_t>(I.op[0])[i] = (uint32_t)v;
    else
      w.reg<uint16_t>(I.op[0])[i] = (uint16_t)v;
  });
}
struct Wide {
  uint64_t lo, hi;
};
void packH(Warp& w, const Inst& I) {  // op[0] <- ext elements of imm bytes each
  const int eb = (int)I.imm, n = I.next, db = I.op[0].width;
  eachLane(w.m, [&](int i) {
    uint8_t buf[16];
    for (int k = 0; k < n; k++) memcpy(buf + k * eb, (uint8_t*)w.reg<uint8_t>(I.ext[k]) + i * I.ext[k].width, eb);
    memcpy(w.reg<uint8_t>(I.op[0]) + i * db, buf, db);
  });
}
void unpackH(Warp& w, const Inst& I) {  // ext elements <- op[0]
  const int eb = (int)I.imm, n = I.next, sb = I.op[0].width;
  eachLane(w.m, [&](int i) {
    uint8_t buf[16];
    memcpy(buf, w.reg<uint8_t>(I.op[0]) + i * sb, sb);
    for (int k = 0; k < n; k++) {
      if (!I.ext[k].present) continue;
      uint8_t* d = w.reg<uint8_t>(I.ext[k]) + i * I.ext[k].width;
      memset(d, 0, I.ext[k].width);
      memcpy(d, buf + k * eb, eb);
    }
  });
}
void movPred(Warp& w, const Inst& I) {
  w.setPred(I.op[0], w.pred(I.op[1]));
}
OpcodeEntry eMov({"mov"}, [](Decoder& d) {
  d.allow({});
  Ty t = d.type();
  if (t == Ty::Pred) {
    Operand a = d.predSrc(d.arg(1));
    d.emit(movPred, Cls::Mov, {d.predDst(d.arg(0)), a});
    return;
  }
  const PtxOperand &D = d.arg(0), &S = d.arg(1);
  int size = tySize(t);
  Ty elems[17] = {};
  elems[1] = Ty::B8;
  elems[2] = Ty::B16;
  elems[4] = Ty::B32;
  elems[8] = Ty::B64;
  if (S.kind == PtxOperand::Vector) {
    int eb = size / (int)S.list.size();
    std::vector<Operand> parts;
    for (auto& e : S.list) parts.push_back(d.src(e, elems[eb]));
    Inst& in = d.emit(packH, Cls::Mov, {d.dst(D, t)});
    in.imm = eb;
    d.setExt(in, parts);
    return;
  }
  if (D.kind == PtxOperand::Vector) {
    int eb = size / (int)D.list.size();
    Operand s = d.src(S, t);
    std::vector<Operand> parts;
    for (auto& e : D.list) parts.push_back(d.dst(e, elems[eb]));
    Inst& in = d.emit(unpackH, Cls::Mov, {s});
    in.imm = eb;
    d.setExt(in, parts);
    return;
  }
  Operand s = d.src(S, t), dst = d.dst(D, t);
  if (s.width != dst.width) {
    d.emit(movConvert, Cls::Mov, {dst, s});
    return;
  }
  d.emit(dst.width == 8    ? movH<uint64_t>
         : dst.width == 4  ? movH<uint32_t>
         : dst.width == 16 ? movH<Wide>
                           : movH<uint16_t>,
         Cls::Mov, {dst, s});
});

// --- selp, slct
template <class T>
void selpH(Warp& w, const Inst& I) {
  T* d = w.reg<T>(I.op[0]);
  const T *a = w.reg<T>(I.op[1]), *b = w.reg<T>(I.op[2]);
  const uint32_t p = w.pred(I.op[3]);
  CUDASIM_LANES((p & (1u << i)) ? a[i] : b[i]);
}
OpcodeEntry eSelp({"selp"}, [](Decoder& d) {
  d.allow({});
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), p = d.predSrc(d.arg(3));
  Operand dst = d.dst(d.arg(0), t);
  d.emit(dst.width == 8   ? selpH<uint64_t>
         : dst.width == 4 ? selpH<uint32_t>
                          : selpH<uint16_t>,
         Cls::Int, {dst, a, b, p});
});
template <class T>
void slctH(Warp& w, const Inst& I) {
  const bool flt = I.sub;
  map3<T, T, T, uint32_t>(w, I, [flt](T a, T b, uint32_t c) {
    float f;
    memcpy(&f, &c, 4);
    return (flt ? f >= 0 : (int32_t)c >= 0) ? a : b;
  });
}
OpcodeEntry eSlct({"slct"}, [](Decoder& d) {
  d.allow({"ftz"});
  Ty c = d.type(0), t = d.type(1);
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), s = d.src(d.arg(3), c);
  d.emit(tySize(t) == 8   ? slctH<uint64_t>
         : tySize(t) == 4 ? slctH<uint32_t>
                          : slctH<uint16_t>,
         Cls::Int, {d.dst(d.arg(0), t), a, b, s})
      .sub = c == Ty::F32;
});

}  // namespace
Operand Decoder::widen(const Operand& o) {
  Operand t = temp(8);
  t.def = true;
  emit(movConvert, Cls::Mov, {t, o});
  t.def = false;
  return t;
}
namespace {
// --- cvta, isspacep (generic addressing, PTX ISA "State Spaces")
template <class S>
void addWindow(Warp& w, const Inst& I) {
  const uint64_t base = (uint64_t)I.imm;
  const bool to = I.sub;
  map1<uint64_t, S>(w, I, [=](S a) { return to ? (uint64_t)a & ~base : ((uint64_t)a | base); });
}
template <class S>
void toWindow32(Warp& w, const Inst& I) {
  map1<uint32_t, S>(w, I, [](S a) { return (uint32_t)a; });
}
void addAddress(Warp& w, const Inst& I) {
  map2<uint64_t, uint64_t, uint64_t>(w, I, [](uint64_t a, uint64_t b) { return a + b; });
}
OpcodeEntry eCvta({"cvta"}, [](Decoder& d) {
  d.allow({"to", "shared", "shared::cta", "shared::cluster", "local", "global", "const", "param", "param::entry"});
  bool shared = d.has("shared") || d.has("shared::cta") || d.has("shared::cluster");
  int64_t base = shared ? (int64_t)kSharedWindow : d.has("local") ? (int64_t)kLocalWindow : 0;
  Ty t = d.type();
  const bool param = d.has("param") || d.has("param::entry");
  if (d.has("const") || param) {  // offsets of an allocation
    Operand a = d.src(d.arg(1), t);
    if (a.width == 4) a = d.widen(a);
    uint64_t by = (uint64_t)(param ? d.kernel().paramData : d.module().constBase);
    Operand by64 = d.constant(d.has("to") ? 0 - by : by, 8);
    d.emit(addAddress, Cls::Int, {d.dst(d.arg(0), Ty::U64), a, by64});
    return;
  }
  Operand a = d.src(d.arg(1), t), dst = d.dst(d.arg(0), t);
  if (dst.width == 4) {
    d.emit(a.width == 8 ? toWindow32<uint64_t> : toWindow32<uint32_t>, Cls::Int, {dst, a});
    return;
  }
  bool to = d.has("to");
  Inst& in = d.emit(a.width == 4 ? addWindow<uint32_t> : addWindow<uint64_t>, Cls::Int, {dst, a});
  in.imm = base;
  in.sub = to;
});
void isspacepH(Warp& w, const Inst& I) {
  const uint64_t* a = w.reg<uint64_t>(I.op[1]);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) {
    uint64_t win = a[i] & kWindowMask;
    bool sharedWin = win == kSharedWindow, own = sharedWin;
    uint32_t rank = (uint32_t)a[i] >> kClusterShift;
    if (sharedWin && rank && (int)rank - 1 != w.block->rank) own = false;
    bool v = I.sub == 0   ? !sharedWin && win != kLocalWindow
             : I.sub == 1 ? own
             : I.sub == 2 ? sharedWin
             : I.sub == 3 ? win == kLocalWindow
                          : false;
    r |= v ? 1u << i : 0;
  }
  w.setPred(I.op[0], r);
}
// mapa: the address of the same variable in another block of the cluster.
template <class T>
void mapaH(Warp& w, const Inst& I) {
  const uint32_t n = (uint32_t)w.block->cluster->blocks.size();
  const uint32_t* rank = w.reg<uint32_t>(I.op[2]);
  eachLane(w.m, [&](int i) {
    if (rank[i] >= n)
      throw Fault(kFaultIllegalAddress, format("mapa names block %u of a cluster of %u", rank[i], n), i);
  });
  map2<T, T, uint32_t>(w, I, [](T a, uint32_t r) {
    const T low = ((T)1 << kClusterShift) - 1, window = (T)(sizeof(T) == 8 ? (uint64_t)a & kWindowMask : 0);
    return (T)(window | ((T)(r + 1) << kClusterShift) | (a & low));
  });
}
template <class T>
void ctaRankH(Warp& w, const Inst& I) {
  const uint32_t own = (uint32_t)w.block->rank;
  map1<uint32_t, T>(w, I, [own](T a) {
    uint32_t r = (uint32_t)a >> kClusterShift;
    return r ? r - 1 : own;
  });
}
OpcodeEntry eMapa({"mapa", "getctarank"}, [](Decoder& d) {
  d.allow({"shared::cluster"});
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t);
  bool wide = a.width == 8;
  if (d.p->op[0] == "getctarank") {
    d.emit(wide ? ctaRankH<uint64_t> : ctaRankH<uint32_t>, Cls::Int, {d.dst(d.arg(0), Ty::U32), a});
    return;
  }
  Operand r = d.src(d.arg(2), Ty::U32);
  d.emit(wide ? mapaH<uint64_t> : mapaH<uint32_t>, Cls::Int, {d.dst(d.arg(0), t), a, r});
});
OpcodeEntry eIsspacep({"isspacep"}, [](Decoder& d) {
  Operand a = d.src(d.arg(1), Ty::U64);
  uint8_t k = d.has("global")                           ? 0
              : d.has("shared") || d.has("shared::cta") ? 1
              : d.has("shared::cluster")                ? 2
              : d.has("local")                          ? 3
                                                        : 4;
  d.emit(isspacepH, Cls::Int, {d.predDst(d.arg(0)), a}).sub = k;
});

}  // namespace
}  // namespace cudasim
