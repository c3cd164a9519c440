// wmma.load, wmma.mma, wmma.store (PTX ISA, "Warp Level Matrix Multiply-
// Accumulate Instructions: wmma"). The ISA leaves the placement of elements in
// fragments open; here element e of lane l is number e * 32 + l of the matrix
// in row-major order, and repeats when the fragment has room for more.
#include <algorithm>
#include <vector>

#include "decoder.h"
#include "exec_memory.h"
#include "float_formats.h"
#include "lanes.h"
#include "tensor_core.h"

namespace cudasim {
namespace {

struct Fragment {
  Elem elem = Elem::None;
  int rows = 0, cols = 0, first = 0, regs = 0;  // first: index of its registers in ext
  int perReg() const { return elem == Elem::F64 ? 1 : 32 / elemBits(elem); }
  int bytes() const { return elemBits(elem) / 8; }
  int perLane() const { return regs * perReg(); }
};
struct WmmaInfo {
  Fragment a, b, c, d;
  bool rowMajor = true, satInt = false;
  Space space = Space::None;
};

uint8_t* element(Warp& w, const Inst& I, const Fragment& f, int e, int lane) {
  const Operand& o = I.ext[f.first + e / f.perReg()];
  return w.reg<uint8_t>(o) + lane * o.width + e % f.perReg() * f.bytes();
}
double toDouble(Elem e, const uint8_t* p) {
  if (e == Elem::F64) {
    double d;
    memcpy(&d, p, 8);
    return d;
  }
  if (e == Elem::S32) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
  }
  float f;
  unpackFloats(e, p, 1, &f);
  return f;
}

bool wholeWarp(Warp& w) {
  if (!converge(w, ~0u)) return false;
  if (w.m != ~0u)
    throw Fault(kFaultIllegalInstruction, format("wmma executed with lanes %08x only", w.m), w.firstLane());
  return true;
}

// op: address, stride
template <bool Store>
void transferH(Warp& w, const Inst& I) {
  if (!wholeWarp(w)) return;
  auto& f = *(const WmmaInfo*)I.aux;
  const Fragment& g = f.a;
  uint64_t base[32], addr[32];
  laneAddresses(w, I.op[0], I.imm, base);
  int64_t stride = I.op[1].present ? (int64_t)w.uniform(I.op[1]) : f.rowMajor ? g.cols : g.rows;
  const int es = g.bytes(), total = g.rows * g.cols;
  for (int e = 0; e < g.perLane(); e++) {
    if (Store && e * 32 >= total) break;
    for (int l = 0; l < 32; l++) {
      int n = (e * 32 + l) % total, r = n / g.cols, c = n % g.cols;
      addr[l] = base[l] + (f.rowMajor ? r * stride + c : c * stride + r) * es;
    }
    Lanes p;
    resolve(w, I, f.space, addr, es, Store ? Access::Write : Access::Read, p);
    uint8_t data[32][8];
    for (int l = 0; l < 32; l++) memcpy(data[l], Store ? element(w, I, g, e, l) : p.p[l], es);
    if (Store) shadowStore(w, p, addr, es, I.line, &data[0][0], 8);
    for (int l = 0; l < 32; l++) memcpy(Store ? p.p[l] : element(w, I, g, e, l), data[l], es);
  }
  if (Store)
    w.launch->progress++;
  else
    laneSync(w, ~0u);
}

void wmmaH(Warp& w, const Inst& I) {
  if (!wholeWarp(w)) return;
  auto& f = *(const WmmaInfo*)I.aux;
  static thread_local double A[32 * 16], B[16 * 32], C[32 * 32];
  auto gather = [&](const Fragment& g, double* out) {
    const int total = g.rows * g.cols;
    for (int e = 0; e * 32 < total; e++)
      for (int l = 0; l < 32; l++)
        if (e * 32 + l < total) out[e * 32 + l] = toDouble(g.elem, element(w, I, g, e, l));
  };
  gather(f.a, A);
  gather(f.b, B);
  gather(f.c, C);
  const int m = f.a.rows, k = f.a.cols, n = f.b.cols;
  if (f.d.elem == Elem::F64 || f.d.elem == Elem::S32) {
    for (int i = 0; i < m; i++)
      for (int kk = 0; kk < k; kk++)
        for (int j = 0; j < n; j++) C[i * n + j] = __builtin_fma(A[i * k + kk], B[kk * n + j], C[i * n + j]);
  } else {
    std::vector<float> a(A, A + m * k), b(B, B + k * n), c(C, C + m * n);
    multiplyAccumulate(f.a.elem, a.data(), b.data(), c.data(), m, n, k);
    std::copy(c.begin(), c.end(), C);
  }
  w.st->mmaFlops += 2ull * m * n * k;
  for (int e = 0; e < f.d.perLane(); e++)
    for (int l = 0; l < 32; l++) {
      double v = C[(e * 32 + l) % (m * n)];
      uint8_t* p = element(w, I, f.d, e, l);
      switch (f.d.elem) {
        case Elem::F16: {
          uint16_t h = f32ToF16(narrowToOdd(v));
          memcpy(p, &h, 2);
          break;
        }
        case Elem::F64: memcpy(p, &v, 8); break;
        case Elem::S32: {
          if (f.satInt) v = std::min(std::max(v, -2147483648.0), 2147483647.0);
          int32_t x = (int32_t)(int64_t)v;
          memcpy(p, &x, 4);
          break;
        }
        default: {
          float x = (float)v;
          memcpy(p, &x, 4);
        }
      }
    }
}

OpcodeEntry eWmma({"wmma"}, [](Decoder& d) {
  auto f = std::make_shared<WmmaInfo>();
  d.kernel().auxStore.push_back(f);
  int m = 0, n = 0, k = 0;
  for (auto& s : d.p->op)
    if (sscanf(s.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  std::vector<Operand> ext;
  auto fragment = [&](Fragment& g, const PtxOperand& o, Elem e, int rows, int cols, bool dst) {
    if (elemBits(e) < 8) d.fail("element type not supported by wmma");
    g.elem = e;
    g.rows = rows;
    g.cols = cols;
    g.first = (int)ext.size();
    Ty t = e == Elem::F64 ? Ty::F64 : Ty::B32;
    if (o.kind == PtxOperand::Vector)
      for (auto& x : o.list) ext.push_back(dst ? d.dst(x, t) : d.src(x, t));
    else
      ext.push_back(dst ? d.dst(o, t) : d.src(o, t));
    g.regs = (int)ext.size() - g.first;
    if (g.perLane() * 32 < rows * cols) d.fail("the fragment is too small for the shape");
  };
  if (d.mod(1, "mma")) {
    Ty td = d.type(3), ta = d.type(2), tb = d.type(1), tc = d.type(0);
    if (td == Ty::Bad) {
      td = d.type(1);
      ta = tb = Ty::F16;
    }  // .dtype.ctype, f16 inputs
    f->satInt = d.has("satfinite");
    fragment(f->d, d.arg(0), elemOf(td), m, n, true);
    fragment(f->a, d.arg(1), elemOf(ta), m, k, false);
    fragment(f->b, d.arg(2), elemOf(tb), k, n, false);
    fragment(f->c, d.arg(3), elemOf(tc), m, n, false);
    Inst& in = d.emit(wmmaH, Cls::Mma);
    in.aux = f.get();
    d.setExt(in, ext);
    return;
  }
  bool store = d.mod(1, "store");
  if (!store && !d.mod(1, "load")) d.fail("unknown wmma instruction");
  f->rowMajor = d.has("row");
  f->space = spaceOf(d);
  Elem e = elemOf(d.type());
  if (d.mod(2, "a"))
    fragment(f->a, d.arg(0), e, m, k, true);
  else if (d.mod(2, "b"))
    fragment(f->a, d.arg(0), e, k, n, true);
  else
    fragment(f->a, d.arg(store ? 1 : 0), e, m, n, !store);
  int64_t disp;
  Operand base = d.addressBase(d.arg(store ? 0 : 1), disp, f->space), stride;
  if (d.nargs() > 2) stride = d.src(d.arg(2), Ty::U32);
  Inst& in = d.emit(store ? transferH<true> : transferH<false>,
                    f->space == Space::Shared ? Cls::LdStShared : Cls::LdStGlobal, {base, stride});
  in.imm = disp;
  in.aux = f.get();
  d.setExt(in, ext);
});

}  // namespace
}  // namespace cudasim
