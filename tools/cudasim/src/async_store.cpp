// st.async, red.async and st.bulk.
#include "bulk_copy.h"

namespace cudasim {

namespace {

// op: address, mbar; ext: values
void asyncStoreH(Warp& w, const Inst& I) {
  uint64_t addr[32], mbar[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], addr);
  laneAddresses(w, I.op[1], disp[1], mbar);
  const Ty t = (Ty)I.sub;
  const int es = tySize(t), n = I.next, op = I.sub2;
  const bool red = I.sub3;
  eachLane(w.m, [&](int i) {
    uint64_t a = plainShared(addr[i]);
    checkAligned(a, es * n, i, "asynchronous store");
    uint32_t off;
    Block* b = sharedTarget(w, a, es * n, i, off);
    MbarAddress mb = mbarAddress(w, mbar[i], i);
    if (mb.block != b) throw Fault(kFaultIllegalInstruction, "the mbarrier is not in the block of the destination", i);
    std::vector<uint8_t> v(es * n);
    for (int k = 0; k < n; k++) memcpy(&v[k * es], w.reg<uint8_t>(I.ext[k]) + i * I.ext[k].width, es);
    VClock issued = w.vc;
    const int line = I.line;
    uint32_t mo = mb.off;
    Warp* wp = &w;
    if (!red) markBulk(w, *b, off, es * n, line);
    queueLoad(w, *b, mo, [=] {
      if (!red) unmarkBulk(*wp, *b, off, es * n);
      Engine ag = makeEngine(*b, mo, issued);
      if (red)
        reduceInto(b->sharedPtr(off), v.data(), es * n, op, t);
      else
        writeShared(*b, off, es * n, v.data(), ag, line);
      completeOn(*b, mo, ag, es * n);
    });
  });
}
void decodeAsyncStore(Decoder& d, bool red) {
  Ty t = d.type();
  std::vector<Operand> vals;
  if (d.arg(1).kind == PtxOperand::Vector)
    for (auto& e : d.arg(1).list) vals.push_back(d.src(e, t));
  else
    vals.push_back(d.src(d.arg(1), t));
  int64_t* disp = keepDisps(d);
  Operand a = d.addressBase(d.arg(0), disp[0], Space::Shared), m = d.addressBase(d.arg(2), disp[1], Space::Shared);
  int op = red ? parseAtomOp(d) : 0;
  Inst& in = d.emit(asyncStoreH, Cls::Async, {a, m});
  in.imm = (int64_t)disp;
  in.sub = (uint8_t)t;
  in.sub2 = (uint8_t)op;
  in.sub3 = red;
  d.setExt(in, vals);
}

}  // namespace

void decodeStAsync(Decoder& d) {
  decodeAsyncStore(d, false);
}
void decodeRedAsync(Decoder& d) {
  decodeAsyncStore(d, true);
}

// st.bulk.weak.shared::cta [a], size, 0: zeroes shared memory.
static void stBulkH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) {
    uint32_t n = I.op[1].width == 8 ? (uint32_t)w.reg<uint64_t>(I.op[1])[i] : w.reg<uint32_t>(I.op[1])[i], off;
    Block* b = sharedTarget(w, plainShared(addr[i]), n, i, off);
    std::vector<uint8_t> zero(n);
    if (w.launch->raceOn) {
      checkPending(w, *b, off, n, I.line, true);
      raceWrite(*b, off, n, actorOf(w, I.line), zero.data());
    }
    memset(b->sharedPtr(off), 0, n);
  });
}
void decodeStBulk(Decoder& d) {
  int64_t disp;
  Operand a = d.addressBase(d.arg(0), disp, Space::Shared), n = d.src(d.arg(1), Ty::B64);
  d.emit(stBulkH, Cls::LdStShared, {a, n}).imm = disp;
}

}  // namespace cudasim
