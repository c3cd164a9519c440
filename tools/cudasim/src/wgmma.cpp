// Asynchronous warpgroup matrix multiply (PTX ISA, "Asynchronous Warpgroup
// Level Matrix Multiply-Accumulate Instructions").
//
// wgmma.mma_async is only recorded; operands are read and accumulators written
// when wgmma.wait_group demands it. Each warp holds its own 16 rows, but the
// operation belongs to the warpgroup: it starts when all four warps have issued
// it, and a wait of one of them completes it for all.
#include "async.h"
#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"
#include "tensor_core.h"

#include <algorithm>

namespace cudasim {
namespace {

struct WgmmaInfo {
  int n, k;
  Elem a, b, d;
  bool aInRegs, transA, transB, satInt;
  float scaleA, scaleB;
  int nd, na;
};

// Matrix descriptor (PTX ISA, "Matrix Descriptor Format").
struct Desc {
  uint32_t start, lbo, sbo;
  int swizzle;  // 0 none, 1 128B, 2 64B, 3 32B
  explicit Desc(uint64_t v)
      : start((uint32_t)(v & 0x3fff) << 4),
        lbo((uint32_t)(v >> 16 & 0x3fff) << 4),
        sbo((uint32_t)(v >> 32 & 0x3fff) << 4),
        swizzle((int)(v >> 62)) {}
  uint32_t chunkRow() const {
    static const uint32_t r[] = {16, 128, 64, 32};
    return r[swizzle];
  }  // bytes per row of the atom
  uint32_t apply(uint32_t a) const {
    switch (swizzle) {
      case 1: return a ^ ((a >> 3) & 0x70);
      case 2: return a ^ ((a >> 3) & 0x30);
      case 3: return a ^ ((a >> 3) & 0x10);
      default: return a;
    }
  }
};

struct Reader {
  Warp& w;
  RaceActor act;
  bool race;
  const uint8_t* chunk(uint32_t addr) {
    if (addr < kSharedBase || addr + 16 > w.block->sharedEnd)
      throw Fault(kFaultIllegalAddress,
                  format("wgmma operand at shared offset %lld; the block has %u bytes of shared memory",
                         (long long)addr - kSharedBase, w.block->sharedEnd - kSharedBase),
                  0);
    if (race) raceRead(*w.block, addr, 16, act);
    return w.block->sharedPtr(addr);
  }
};

// Calls f(address, row, column) for the 16-byte chunks of rows [first, first +
// count) of an operand of `k` columns; a chunk holds T elements of a row, or of
// a column when the operand is MN-major.
template <class F>
void eachChunk(const Desc& d, bool mnMajor, int first, int count, int k, int T, F f) {
  if (!mnMajor) {
    for (int r = 0; r < count; r++) {
      int row = first + r;
      for (int c = 0; c < k / T; c++) {
        uint32_t a = d.start + (row % 8) * d.chunkRow() + (row / 8) * d.sbo + (d.swizzle ? c * 16 : c * d.lbo);
        f(d.apply(a), r, c * T);
      }
    }
    return;
  }
  // MN-major: ((T,J,m),(8,k)) with J chunks of 16 bytes per atom row.
  const int J = (int)d.chunkRow() / 16;
  for (int kk = 0; kk < k; kk++)
    for (int r = 0; r < count; r += T) {
      int row = first + r, j = row / T % J, m = row / T / J;
      uint32_t a = d.start + j * 16 + (kk % 8) * d.chunkRow();
      a += d.swizzle ? m * d.lbo + (kk / 8) * d.sbo : m * d.sbo + (kk / 8) * d.lbo;
      f(d.apply(a), r, kk);
    }
}

// Loads them as out[k * ld + row] (transposed) or out[row * k + col].
void loadOperand(Reader& rd, Elem e, const Desc& d, bool mnMajor, int first, int count, int k, float* out,
                 bool transposedOut, int ld) {
  const int T = 16 / (elemBits(e) / 8);
  eachChunk(d, mnMajor, first, count, k, T, [&](uint32_t addr, int row, int col) {
    float v[16];
    unpackFloats(e, rd.chunk(addr), T, v);
    for (int t = 0; t < T; t++) {
      const int r = mnMajor ? row + t : row, c = mnMajor ? col : col + t;
      out[transposedOut ? c * ld + r : r * k + c] = v[t];
    }
  });
}

// The operands are read late; a copy must have been waited for before the issue.
void checkOperand(Warp& w, Elem e, const Desc& d, bool mnMajor, int first, int count, int k, int line) {
  eachChunk(d, mnMajor, first, count, k, 16 / (elemBits(e) / 8), [&](uint32_t addr, int, int) {
    if (addr >= kSharedBase && addr + 16 <= w.block->sharedEnd) checkPending(w, *w.block, addr, 16, line, false);
  });
}

// 8-bit products and sums of up to 32 of them are exact in binary32.
void performInt(Warp& w, const PendingWgmma& p, const float* A, const float* B) {
  const Inst& I = *p.inst;
  auto& f = *(const WgmmaInfo*)I.aux;
  static thread_local float C[16 * 256];
  memset(C, 0, sizeof(float) * 16 * f.n);
  multiplyAccumulate(f.a, A, B, C, 16, f.n, f.k);
  for (int j = 0; j < f.n / 8; j++)
    for (int e = 0; e < 4; e++) {
      int32_t* acc = w.reg<int32_t>(I.ext[4 * j + e]);
      for (int l = 0; l < 32; l++) {
        int64_t v = (int64_t)C[(l / 4 + 8 * (e >> 1)) * f.n + 8 * j + (l % 4) * 2 + (e & 1)] + (p.scaleD ? acc[l] : 0);
        if (f.satInt) v = std::min<int64_t>(std::max<int64_t>(v, INT32_MIN), INT32_MAX);
        acc[l] = (int32_t)v;
      }
    }
  w.launch->progress++;
}

// `epoch` is a time of warp `reader` at which no other access happens.
void perform(Warp& w, const PendingWgmma& p, int reader, uint32_t epoch) {
  const Inst& I = *p.inst;
  auto& f = *(const WgmmaInfo*)I.aux;
  static thread_local float A[16 * 32], B[32 * 256], C[16 * 256];
  Reader rd{w, {}, w.launch->raceOn};
  if (rd.race) rd.act = {reader, epoch, &p.issued, &p.issuedProxy, I.line};
  const Operand *acc = I.ext, *ra = I.ext + f.nd;
  if (f.aInRegs) {
    const int E = 32 / elemBits(f.a);
    for (int r = 0; r < 4; r++) {
      const uint32_t* v = w.reg<uint32_t>(ra[r]);
      for (int l = 0; l < 32; l++) {
        int row = l / 4 + 8 * (r & 1), k = (l % 4) * E + (r >> 1) * 4 * E;
        unpackFloats(f.a, (const uint8_t*)&v[l], E, &A[row * f.k + k]);
      }
    }
  } else {
    loadOperand(rd, f.a, Desc(p.descA), f.transA, (w.id % 4) * 16, 16, f.k, A, false, 0);
  }
  loadOperand(rd, f.b, Desc(p.descB), f.transB, 0, f.n, f.k, B, true, f.n);
  if (f.scaleA * f.scaleB < 0)
    for (int i = 0; i < 16 * f.k; i++) A[i] = -A[i];
  if (f.d == Elem::S32) {
    performInt(w, p, A, B);
    return;
  }
  const bool half = f.d == Elem::F16;
  for (int j = 0; j < f.n / 8; j++)
    for (int e = 0; e < 4; e++) {
      const Operand& o = half ? acc[2 * j + e / 2] : acc[4 * j + e];
      for (int l = 0; l < 32; l++) {
        float v = 0;
        if (p.scaleD) v = half ? f16ToF32(w.reg<uint16_t>(o)[2 * l + (e & 1)]) : w.reg<float>(o)[l];
        C[(l / 4 + 8 * (e >> 1)) * f.n + 8 * j + (l % 4) * 2 + (e & 1)] = v;
      }
    }
  multiplyAccumulate(f.a, A, B, C, 16, f.n, f.k);
  for (int j = 0; j < f.n / 8; j++)
    for (int e = 0; e < 4; e++) {
      const Operand& o = half ? acc[2 * j + e / 2] : acc[4 * j + e];
      for (int l = 0; l < 32; l++) {
        float v = C[(l / 4 + 8 * (e >> 1)) * f.n + 8 * j + (l % 4) * 2 + (e & 1)];
        if (half)
          w.reg<uint16_t>(o)[2 * l + (e & 1)] = f32ToF16(v);
        else
          w.reg<uint32_t>(o)[l] = v != v ? 0x7fffffffu : bitsOf(v);
      }
    }
  w.launch->progress++;
}

// A pending operation owns its registers until it is waited for. ptxas accepts
// programs that break this and serialises them, so the operation is finished
// first, and the place reported.
void asyncGuard(Warp& w, const Inst& I) {
  if (!w.wgmma.empty()) {
    size_t finish = 0;
    const Inst* with = nullptr;
    auto check = [&](const Operand& o) {
      if (o.reg < 0) return;
      for (size_t n = 0; n < w.wgmma.size(); n++) {
        const Inst& P = *w.wgmma[n].inst;
        const int nd = ((const WgmmaInfo*)P.aux)->nd;
        for (int k = 0; k < P.next; k++)
          if (P.ext[k].reg == o.reg && (o.def || k < nd)) {
            finish = n + 1;
            with = &P;
          }
      }
    };
    for (int i = 0; i < I.nops; i++) check(I.op[i]);
    for (int i = 0; i < I.next; i++) check(I.ext[i]);
    if (finish) {
      noteHazard(w, "registers of a pending wgmma are used before wgmma.wait_group (ptxas would serialise the wgmma)",
                 I.line, with->line);
      uint32_t epoch = w.launch->raceOn ? w.vc[w.clockId] : 0;
      for (size_t n = 0; n < finish; n++) perform(w, w.wgmma[n], w.clockId, epoch);
      w.wgmma.erase(w.wgmma.begin(), w.wgmma.begin() + finish);
    }
  }
  I.inner(w, I);
  auto dirty = [&](const Operand& o) {
    if (o.def && o.reg >= 0) w.wgmmaDirty[o.reg] = &I;
  };
  for (int i = 0; i < I.nops; i++) dirty(I.op[i]);
  for (int i = 0; i < I.next; i++) dirty(I.ext[i]);
}

// Accumulators and A fragments written by other instructions need a wgmma.fence.
// Compilers put register moves behind the fence of a correct source, and ptxas
// copes with them: those are worth a remark only.
void checkFence(Warp& w, const Inst& I) {
  if (!w.wgmmaFenced) noteHazard(w, "wgmma.mma_async without a wgmma.fence before it", I.line, 0);
  if (w.wgmmaDirty.empty()) return;
  const char* what = "wgmma.mma_async uses a register written since the last wgmma.fence";
  const Inst* move = nullptr;
  for (int i = 0; i < I.next; i++) {
    auto it = w.wgmmaDirty.find(I.ext[i].reg);
    if (it == w.wgmmaDirty.end()) continue;
    if (it->second->cls != Cls::Mov) return noteHazard(w, what, I.line, it->second->line);
    if (!move) move = it->second;
  }
  if (move) noteOnce(w, what, I.line, move->line);
}

bool wholeWarp(Warp& w) {
  if (!converge(w, ~0u)) return false;
  if (w.m != ~0u)
    throw Fault(kFaultIllegalInstruction, format("wgmma executed with lanes %08x only", w.m), w.firstLane());
  return true;
}

// op: descA, descB, scale-d predicate
void wgmmaH(Warp& w, const Inst& I) {
  if (!wholeWarp(w)) return;
  auto& f = *(const WgmmaInfo*)I.aux;
  checkFence(w, I);
  PendingWgmma p;
  p.inst = &I;
  p.descA = f.aInRegs ? 0 : w.reg<uint64_t>(I.op[0])[0];
  p.descB = w.reg<uint64_t>(I.op[1])[0];
  p.group = w.wgmmaGroup;
  p.scaleD = w.pred(I.op[2]) & 1;
  if (w.launch->raceOn) {
    p.issued = w.vc;
    p.issuedProxy = w.proxy;
    if (w.block->race.pendingWords) {
      if (!f.aInRegs) checkOperand(w, f.a, Desc(p.descA), f.transA, (w.id % 4) * 16, 16, f.k, I.line);
      checkOperand(w, f.b, Desc(p.descB), f.transB, 0, f.n, f.k, I.line);
    }
  }
  w.st->mmaFlops += 2ull * 16 * f.n * f.k;
  w.wgmma.push_back(std::move(p));
}
void commitH(Warp& w, const Inst&) {
  if (wholeWarp(w)) w.wgmmaGroup++;
}
void waitH(Warp& w, const Inst& I) {
  if (!wholeWarp(w)) return;
  if (w.wgmmaGroup <= (uint32_t)I.imm) return;
  const uint32_t target = w.wgmmaGroup - (uint32_t)I.imm;  // groups that must be complete
  Block& b = *w.block;
  const size_t first = (size_t)w.id / 4 * 4, last = std::min(first + 4, b.warps.size());
  for (size_t i = first; i < last; i++)
    if (b.warps[i]->live && b.warps[i]->wgmmaGroup < target) {  // not issued by the whole warpgroup yet
      w.npc = w.pc;
      w.polled = true;
      w.ev = Event::Yield;
      return;
    }
  const bool race = w.launch->raceOn;
  uint32_t epoch = race ? ++w.vc[w.clockId] : 0;
  for (size_t i = first; i < last; i++) {
    Warp& x = *b.warps[i];
    size_t n = 0;
    while (n < x.wgmma.size() && x.wgmma[n].group < target) perform(x, x.wgmma[n++], w.clockId, epoch);
    x.wgmma.erase(x.wgmma.begin(), x.wgmma.begin() + n);
  }
  if (!race) return;
  // The reads of the operation, and nothing else, are ordered before every wait of the warpgroup.
  VClock& done = b.wgmmaReads[first / 4];
  if (done.size() < w.vc.size()) done.resize(w.vc.size(), 0);
  done[w.clockId] = epoch;
  ++w.vc[w.clockId];
  joinClock(w.vc, done);
}
void fenceH(Warp& w, const Inst&) {
  if (!wholeWarp(w)) return;
  w.wgmmaFenced = true;
  w.wgmmaDirty.clear();
}

}  // namespace
void guardAsyncRegisters(Kernel& k, const std::set<int>& regs) {
  for (Inst& in : k.code) {
    bool uses = false;
    for (int i = 0; i < in.nops; i++) uses |= regs.count(in.op[i].reg) != 0;
    for (int i = 0; i < in.next; i++) uses |= regs.count(in.ext[i].reg) != 0;
    if (!uses || in.fn == wgmmaH) continue;
    in.inner = in.fn;
    in.fn = asyncGuard;
  }
}
namespace {
OpcodeEntry eWgmma({"wgmma"}, [](Decoder& d) {
  if (d.mod(1, "fence")) {
    d.emit(fenceH, Cls::Wgmma);
    return;
  }
  if (d.mod(1, "commit_group")) {
    d.emit(commitH, Cls::Wgmma);
    return;
  }
  if (d.mod(1, "wait_group")) {
    if (d.arg(0).kind != PtxOperand::Imm) d.fail("the group count must be an immediate");
    d.emit(waitH, Cls::Wgmma).imm = (int64_t)d.arg(0).bits;
    return;
  }
  if (!d.mod(1, "mma_async") || d.mod(2, "sp")) d.fail("unsupported wgmma instruction");
  auto f = std::make_shared<WgmmaInfo>();
  d.kernel().auxStore.push_back(f);
  int m = 0;
  for (auto& s : d.p->op)
    if (sscanf(s.c_str(), "m%dn%dk%d", &m, &f->n, &f->k) == 3) break;
  if (m != 64 || f->n % 8 || f->n > 256) d.fail("unsupported wgmma shape");
  f->d = elemOf(d.type(2));
  f->a = elemOf(d.type(1));
  f->b = elemOf(d.type(0));
  if (f->d != Elem::F32 && f->d != Elem::F16 && f->d != Elem::S32) d.fail("accumulator type not supported");
  f->satInt = d.has("satfinite");
  std::vector<Operand> ext;
  for (auto& e : d.arg(0).list) {
    Operand o = d.dst(e, Ty::B32);
    d.pinAsync(o);  // written when the group is waited for, whatever else happens to the register
    ext.push_back(o);
  }
  f->nd = (int)ext.size();
  if (f->nd != f->n / (f->d == Elem::F16 ? 4 : 2)) d.fail("wrong number of accumulators");
  f->aInRegs = d.arg(1).kind == PtxOperand::Vector;
  Operand da, db, sd;
  if (f->aInRegs)
    for (auto& e : d.arg(1).list) {
      Operand o = d.src(e, Ty::B32);
      d.pinAsync(o);
      ext.push_back(o);
    }
  else
    da = d.src(d.arg(1), Ty::B64);
  f->na = (int)ext.size() - f->nd;
  db = d.src(d.arg(2), Ty::B64);
  const PtxOperand& s = d.arg(3);
  sd = s.kind == PtxOperand::Imm ? d.constant(s.bits != 0, 0) : d.predSrc(s);
  auto immediate = [&](size_t i, int64_t dflt) { return i < d.nargs() ? (int64_t)d.arg(i).bits : dflt; };
  f->scaleA = (float)immediate(4, 1);
  f->scaleB = (float)immediate(5, 1);
  f->transA = !f->aInRegs && immediate(6, 0);
  f->transB = immediate(f->aInRegs ? 6 : 7, 0);
  Inst& in = d.emit(wgmmaH, Cls::Wgmma, {da, db, sd});
  in.aux = f.get();
  d.setExt(in, ext);
});

}  // namespace
}  // namespace cudasim
