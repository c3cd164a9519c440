// Warp-level matrix instructions (PTX ISA, "Warp Level Matrix Multiply-
// Accumulate Instructions").
#include "tensor_core.h"

#include <algorithm>

#include "decoder.h"
#include "exec_memory.h"
#include "float_formats.h"
#include "lanes.h"

namespace cudasim {

Elem elemOf(Ty t) {
  switch (t) {
    case Ty::F16: return Elem::F16;
    case Ty::BF16: return Elem::BF16;
    case Ty::TF32: return Elem::TF32;
    case Ty::E4M3: return Elem::E4M3;
    case Ty::E5M2: return Elem::E5M2;
    case Ty::S8: return Elem::S8;
    case Ty::U8: return Elem::U8;
    case Ty::S4: return Elem::S4;
    case Ty::U4: return Elem::U4;
    case Ty::B1: return Elem::B1;
    case Ty::F64: return Elem::F64;
    case Ty::F32: return Elem::F32;
    case Ty::S32: return Elem::S32;
    default: return Elem::None;
  }
}
int elemBits(Elem e) {
  switch (e) {
    case Elem::F16:
    case Elem::BF16: return 16;
    case Elem::TF32:
    case Elem::F32:
    case Elem::S32: return 32;
    case Elem::E4M3:
    case Elem::E5M2:
    case Elem::S8:
    case Elem::U8: return 8;
    case Elem::S4:
    case Elem::U4: return 4;
    case Elem::B1: return 1;
    case Elem::F64: return 64;
    default: return 0;
  }
}
void unpackFloats(Elem e, const uint8_t* src, int count, float* dst) {
  switch (e) {
    case Elem::F16:
      for (int i = 0; i < count; i++) {
        uint16_t v;
        memcpy(&v, src + 2 * i, 2);
        dst[i] = f16ToF32(v);
      }
      return;
    case Elem::BF16:
      for (int i = 0; i < count; i++) {
        uint16_t v;
        memcpy(&v, src + 2 * i, 2);
        dst[i] = bf16ToF32(v);
      }
      return;
    case Elem::TF32:  // the low 13 bits are ignored
      for (int i = 0; i < count; i++) {
        uint32_t v;
        memcpy(&v, src + 4 * i, 4);
        dst[i] = floatOf(v & ~0x1fffu);
      }
      return;
    case Elem::E4M3:
    case Elem::E5M2: {
      static const auto* table = [] {
        auto* t = new float[2][256];
        for (int i = 0; i < 256; i++) {
          t[0][i] = e4m3ToF32((uint8_t)i);
          t[1][i] = e5m2ToF32((uint8_t)i);
        }
        return t;
      }();
      for (int i = 0; i < count; i++) dst[i] = table[e == Elem::E5M2][src[i]];
      return;
    }
    case Elem::S8:
      for (int i = 0; i < count; i++) dst[i] = (int8_t)src[i];
      return;
    case Elem::U8:
      for (int i = 0; i < count; i++) dst[i] = src[i];
      return;
    default:
      for (int i = 0; i < count; i++) memcpy(&dst[i], src + 4 * i, 4);
  }
}
int32_t unpackInt(Elem e, uint32_t reg, int i) {
  switch (e) {
    case Elem::S8: return (int8_t)(reg >> 8 * i);
    case Elem::U8: return (uint8_t)(reg >> 8 * i);
    case Elem::S4: return (int32_t)(reg << (28 - 4 * i)) >> 28;
    case Elem::U4: return reg >> 4 * i & 15;
    default: return reg >> i & 1;
  }
}

namespace {

struct MmaInfo {
  int m, n, k;
  Elem a, b, d, c;
  int na, nb, nc, nd;  // registers
  bool satInt, bitAnd;
};

[[noreturn]] void partial(Warp& w, const char* what) {
  throw Fault(kFaultIllegalInstruction, format("%s executed with lanes %08x only; it needs the whole warp", what, w.m),
              w.firstLane());
}

// Row and column of accumulator element e of a lane.
inline void accIndex(const MmaInfo& f, int lane, int e, int& row, int& col) {
  row = lane / 4 + (f.m == 16 ? 8 * ((e >> 1) & 1) : 0);
  col = (lane % 4) * 2 + (e & 1);
}

void mmaFloat(Warp& w, const Inst& I, const MmaInfo& f) {
  float A[16 * 32], B[32 * 8], C[16 * 8];
  const int E = 32 / elemBits(f.a);
  const Operand *ra = I.ext + f.nd, *rb = ra + f.na, *rc = rb + f.nb;
  for (int r = 0; r < f.na; r++) {
    const uint32_t* v = w.reg<uint32_t>(ra[r]);
    for (int l = 0; l < 32; l++) {
      int row = l / 4 + (f.m == 16 ? 8 * (r & 1) : 0), k = (l % 4) * E + (f.m == 16 ? r >> 1 : r) * 4 * E;
      unpackFloats(f.a, (const uint8_t*)&v[l], E, &A[row * f.k + k]);
    }
  }
  for (int r = 0; r < f.nb; r++) {
    const uint32_t* v = w.reg<uint32_t>(rb[r]);
    for (int l = 0; l < 32; l++) {
      float t[4];
      unpackFloats(f.b, (const uint8_t*)&v[l], E, t);
      for (int e = 0; e < E; e++) B[((l % 4) * E + r * 4 * E + e) * 8 + l / 4] = t[e];
    }
  }
  const int accs = f.m == 16 ? 4 : 2;
  for (int e = 0; e < accs; e++)
    for (int l = 0; l < 32; l++) {
      int row, col;
      accIndex(f, l, e, row, col);
      float v;
      if (f.c == Elem::F16)
        v = f16ToF32((uint16_t)(w.reg<uint32_t>(rc[e / 2])[l] >> 16 * (e & 1)));
      else
        v = w.reg<float>(rc[e])[l];
      C[row * 8 + col] = v;
    }
  multiplyAccumulate(f.a, A, B, C, f.m, 8, f.k);
  for (int e = 0; e < accs; e++)
    for (int l = 0; l < 32; l++) {
      int row, col;
      accIndex(f, l, e, row, col);
      float v = C[row * 8 + col];
      if (f.d == Elem::F16)
        w.reg<uint16_t>(I.ext[e / 2])[2 * l + (e & 1)] = f32ToF16(v);
      else
        w.reg<uint32_t>(I.ext[e])[l] = v != v ? 0x7fffffffu : bitsOf(v);
    }
}
void mmaDouble(Warp& w, const Inst& I, const MmaInfo& f) {
  double A[16 * 16], B[16 * 8], C[16 * 8];
  const Operand *ra = I.ext + f.nd, *rb = ra + f.na, *rc = rb + f.nb;
  for (int l = 0; l < 32; l++) {
    for (int r = 0; r < f.na; r++) {
      int row = l / 4 + (f.m == 16 ? 8 * (r & 1) : 0), k = l % 4 + 4 * (f.m == 16 ? r >> 1 : r);
      A[row * f.k + k] = w.reg<double>(ra[r])[l];
    }
    for (int r = 0; r < f.nb; r++) B[(l % 4 + 4 * r) * 8 + l / 4] = w.reg<double>(rb[r])[l];
    for (int e = 0; e < f.nc; e++) {
      int row, col;
      accIndex(f, l, e, row, col);
      C[row * 8 + col] = w.reg<double>(rc[e])[l];
    }
  }
  for (int i = 0; i < f.m; i++)
    for (int k = 0; k < f.k; k++)
      for (int j = 0; j < 8; j++) C[i * 8 + j] = __builtin_fma(A[i * f.k + k], B[k * 8 + j], C[i * 8 + j]);
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < f.nd; e++) {
      int row, col;
      accIndex(f, l, e, row, col);
      w.reg<double>(I.ext[e])[l] = C[row * 8 + col];
    }
}
void mmaInt(Warp& w, const Inst& I, const MmaInfo& f) {
  static thread_local int32_t A[16 * 256], B[256 * 8];
  int64_t C[16 * 8];
  const int E = 32 / elemBits(f.a);
  const Operand *ra = I.ext + f.nd, *rb = ra + f.na, *rc = rb + f.nb;
  for (int l = 0; l < 32; l++) {
    for (int r = 0; r < f.na; r++) {
      uint32_t v = w.reg<uint32_t>(ra[r])[l];
      int row = l / 4 + (f.m == 16 ? 8 * (r & 1) : 0), k = (l % 4) * E + (f.m == 16 ? r >> 1 : r) * 4 * E;
      for (int e = 0; e < E; e++) A[row * f.k + k + e] = unpackInt(f.a, v, e);
    }
    for (int r = 0; r < f.nb; r++) {
      uint32_t v = w.reg<uint32_t>(rb[r])[l];
      for (int e = 0; e < E; e++) B[((l % 4) * E + r * 4 * E + e) * 8 + l / 4] = unpackInt(f.b, v, e);
    }
    for (int e = 0; e < f.nc; e++) {
      int row, col;
      accIndex(f, l, e, row, col);
      C[row * 8 + col] = w.reg<int32_t>(rc[e])[l];
    }
  }
  for (int i = 0; i < f.m; i++)
    for (int k = 0; k < f.k; k++)
      for (int j = 0; j < 8; j++) {
        int32_t x = A[i * f.k + k], y = B[k * 8 + j];
        C[i * 8 + j] += f.a == Elem::B1 ? (f.bitAnd ? x & y : x ^ y) : (int64_t)x * y;
      }
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < f.nd; e++) {
      int row, col;
      accIndex(f, l, e, row, col);
      int64_t v = C[row * 8 + col];
      if (f.satInt) v = std::min<int64_t>(std::max<int64_t>(v, INT32_MIN), INT32_MAX);
      w.reg<int32_t>(I.ext[e])[l] = (int32_t)v;
    }
}
void mmaH(Warp& w, const Inst& I) {
  auto& f = *(const MmaInfo*)I.aux;
  if (!converge(w, ~0u)) return;
  if (w.m != ~0u) partial(w, "mma.sync");
  w.st->mmaFlops += 2ull * f.m * f.n * f.k;
  if (f.a == Elem::F64)
    mmaDouble(w, I, f);
  else if (f.d == Elem::S32)
    mmaInt(w, I, f);
  else
    mmaFloat(w, I, f);
}

bool parseShape(const std::string& s, int& m, int& n, int& k) {
  return sscanf(s.c_str(), "m%dn%dk%d", &m, &n, &k) == 3;
}

void appendRegs(Decoder& d, std::vector<Operand>& v, const PtxOperand& o, Ty t, bool dst) {
  if (o.kind == PtxOperand::Vector)
    for (auto& e : o.list) v.push_back(dst ? d.dst(e, t) : d.src(e, t));
  else
    v.push_back(dst ? d.dst(o, t) : d.src(o, t));
}

OpcodeEntry eMma({"mma"}, [](Decoder& d) {
  if (d.mod(1, "sp") || d.has("sp::ordered_metadata")) d.fail("sparse mma is not supported");
  d.allow({"sync", "aligned", "m16n8k16", "m16n8k8", "m16n8k4", "m16n8k32", "m16n8k64", "m16n8k128", "m16n8k256",
           "m8n8k4", "m8n8k16", "m8n8k32", "m8n8k128", "row", "col", "satfinite", "xor", "and", "popc"});
  auto f = std::make_shared<MmaInfo>();
  d.kernel().auxStore.push_back(f);
  for (auto& s : d.p->op) parseShape(s, f->m, f->n, f->k);
  Ty td = d.type(3), ta = d.type(2), tb = d.type(1), tc = d.type(0);
  f->d = elemOf(td);
  f->a = elemOf(ta);
  f->b = elemOf(tb);
  f->c = elemOf(tc);
  if (f->a == Elem::F32) f->a = f->b = Elem::TF32;
  if (f->m == 8 && f->a == Elem::F16) d.fail("mma.m8n8k4 for f16 (sm_70) is not supported");
  f->satInt = d.has("satfinite");
  f->bitAnd = d.has("and");
  bool dbl = f->a == Elem::F64;
  Ty rt = dbl ? Ty::F64 : Ty::B32;
  std::vector<Operand> ext;
  appendRegs(d, ext, d.arg(0), rt, true);
  f->nd = (int)ext.size();
  appendRegs(d, ext, d.arg(1), rt, false);
  f->na = (int)ext.size() - f->nd;
  appendRegs(d, ext, d.arg(2), rt, false);
  f->nb = (int)ext.size() - f->nd - f->na;
  appendRegs(d, ext, d.arg(3), rt, false);
  f->nc = (int)ext.size() - f->nd - f->na - f->nb;
  int bits = elemBits(f->a), perReg = dbl ? 1 : 32 / bits;
  if (f->na * 32 * perReg != f->m * f->k || f->nb * 32 * perReg != f->n * f->k)
    d.fail("the fragments do not fit the shape");
  Inst& in = d.emit(mmaH, Cls::Mma);
  in.aux = f.get();
  d.setExt(in, ext);
});

// --- ldmatrix, stmatrix, movmatrix
// op[0] address; ext: the registers. sub: matrices, sub2: transposed, sub3: store.
void matrixH(Warp& w, const Inst& I) {
  if (!converge(w, ~0u)) return;
  if (w.m != ~0u) partial(w, I.sub3 ? "stmatrix" : "ldmatrix");
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  const int n = I.sub;
  const bool race = w.launch->raceOn;
  RaceActor act;
  if (race) act = actorOf(w, I.line);
  for (int j = 0; j < n; j++) {
    uint16_t tile[8][8];
    uint32_t off[8];
    Block* blk[8];
    for (int r = 0; r < 8; r++) {
      uint64_t a = addr[8 * j + r];
      if ((a & kWindowMask) == kSharedWindow) a &= ~kWindowMask;
      if (a & 15)
        throw Fault(kFaultMisaligned, format("matrix row at misaligned shared address 0x%llx", (unsigned long long)a),
                    8 * j + r);
      blk[r] = sharedTarget(w, a, 16, 8 * j + r, off[r]);
      if (race) checkPending(w, *blk[r], off[r], 16, I.line, I.sub3);
      if (!I.sub3) {
        memcpy(tile[r], blk[r]->sharedPtr(off[r]), 16);
        if (race) raceRead(*blk[r], off[r], 16, act);
      }
    }
    uint32_t waves, ideal;
    bankWavefronts(off, 0xff, 16, waves, ideal);
    w.st->sharedWavefronts += waves;
    w.st->sharedExcess += waves - ideal;
    uint32_t* reg = w.reg<uint32_t>(I.ext[j]);
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 2; e++) {
        uint16_t& x = I.sub2 ? tile[2 * (l % 4) + e][l / 4] : tile[l / 4][2 * (l % 4) + e];
        if (I.sub3)
          x = (uint16_t)(reg[l] >> 16 * e);
        else
          ((uint16_t*)&reg[l])[e] = x;
      }
    if (I.sub3)
      for (int r = 0; r < 8; r++) {
        if (race) raceWrite(*blk[r], off[r], 16, act, (const uint8_t*)tile[r]);
        if (w.lanes && blk[r] == w.block) laneAccess(w, 8 * j + r, off[r], 16, I.line, true);
        memcpy(blk[r]->sharedPtr(off[r]), tile[r], 16);
      }
  }
  w.st->sharedRequests++;
  if (I.sub3) w.launch->progress++;
}
void decodeMatrix(Decoder& d, bool store) {
  d.allow({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
  std::vector<Operand> regs;
  appendRegs(d, regs, d.arg(store ? 1 : 0), Ty::B32, !store);
  size_t n = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  if (regs.size() != n || d.type() != Ty::B16) d.fail("unsupported matrix form");
  int64_t disp;
  Operand base = d.addressBase(d.arg(store ? 0 : 1), disp, Space::Shared);
  Inst& in = d.emit(matrixH, Cls::LdMatrix, {base});
  in.imm = disp;
  in.sub = (uint8_t)n;
  in.sub2 = d.has("trans");
  in.sub3 = store;
  d.setExt(in, regs);
}
OpcodeEntry eLdmatrix({"ldmatrix"}, [](Decoder& d) { decodeMatrix(d, false); });
OpcodeEntry eStmatrix({"stmatrix"}, [](Decoder& d) { decodeMatrix(d, true); });
void movmatrixH(Warp& w, const Inst& I) {
  if (!converge(w, ~0u)) return;
  if (w.m != ~0u) partial(w, "movmatrix");
  const uint32_t* a = w.reg<uint32_t>(I.op[1]);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  uint16_t tile[8][8];
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 2; e++) tile[l / 4][2 * (l % 4) + e] = (uint16_t)(a[l] >> 16 * e);
  for (int l = 0; l < 32; l++) d[l] = tile[2 * (l % 4)][l / 4] | (uint32_t)tile[2 * (l % 4) + 1][l / 4] << 16;
}
OpcodeEntry eMovmatrix({"movmatrix"}, [](Decoder& d) {
  Operand a = d.src(d.arg(1), Ty::B32);
  d.emit(movmatrixH, Cls::LdMatrix, {d.dst(d.arg(0), Ty::B32), a});
});

}  // namespace
}  // namespace cudasim
