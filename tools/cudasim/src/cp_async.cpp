// Non-bulk asynchronous copies (PTX ISA, "Data Movement and Conversion
// Instructions: Asynchronous copy"). A copy is recorded when issued and both
// reads its source and writes shared memory only when a wait requires it.
#include "async.h"
#include "decoder.h"
#include "exec_memory.h"
#include "lanes.h"

namespace cudasim {

static void moveBytes(Warp& w, CpAsync& c, uint32_t lanes) {
  RaceActor a = {w.clockId, w.launch->raceOn ? w.vc[w.clockId] : 0, &c.issued, nullptr, c.line};
  eachLane(lanes, [&](int i) {
    uint8_t buf[16] = {};
    memcpy(buf, (const void*)c.src[i], c.srcBytes[i]);
    if (w.launch->raceOn) raceWrite(*w.block, c.dst[i], c.bytes, a, buf);
    memcpy(w.block->sharedPtr(c.dst[i]), buf, c.bytes);
  });
  w.launch->progress++;
}

// Performs the pending copies of `lanes` up to the group `newestDue` of each
// lane, and among them those issued before `seq`.
static void landCopies(Warp& w, uint32_t lanes, const uint32_t* newestDue, uint64_t seq) {
  for (size_t e = 0; e < w.cpAsync.size();) {
    CpAsync& c = w.cpAsync[e];
    uint32_t now = 0;
    if (c.seq < seq)
      eachLane(c.mask & lanes, [&](int i) {
        if (c.group[i] <= newestDue[i]) now |= 1u << i;
      });
    if (now) {
      c.mask &= ~now;
      if (w.launch->raceOn) eachLane(now, [&](int i) { unmarkPending(*w.block, c.dst[i], c.bytes, w.clockId); });
      if (w.lanes) eachLane(now, [&](int i) { laneAccess(w, i, c.dst[i], c.bytes, c.line, true); });
      if (now & ~c.landed) moveBytes(w, c, now & ~c.landed);
    }
    if (c.mask == 0)
      w.cpAsync.erase(w.cpAsync.begin() + e);
    else
      e++;
  }
}
void landAllCpAsync(Warp& w, uint32_t lanes, uint64_t seq) {
  uint32_t due[32];
  for (auto& d : due) d = ~0u;
  landCopies(w, lanes, due, seq);
}

namespace {

// op: dst, src, srcSize, ignore predicate. imm/imm2 displacements, sub bytes.
void cpAsyncH(Warp& w, const Inst& I) {
  uint64_t dst[32], src[32];
  laneAddresses(w, I.op[0], I.imm, dst);
  laneAddresses(w, I.op[1], I.imm2, src);
  w.cpAsync.emplace_back();
  CpAsync& c = w.cpAsync.back();
  c.mask = w.m;
  c.bytes = I.sub;
  c.line = I.line;
  c.seq = w.cpSeq++;
  uint32_t ignore = I.op[3].present ? w.pred(I.op[3]) : 0;
  uint32_t off[32] = {};
  uint64_t addr[32];
  uint32_t reading = 0;
  eachLane(w.m, [&](int i) {
    uint32_t n = I.op[2].present ? w.reg<uint32_t>(I.op[2])[i] : c.bytes;
    if (ignore >> i & 1) n = 0;
    if (n > c.bytes)
      throw Fault(kFaultIllegalInstruction, format("cp.async source size %u exceeds its copy size %u", n, c.bytes), i);
    uint64_t d = dst[i];
    if ((d & kWindowMask) == kSharedWindow) d &= ~kWindowMask;
    if ((d | src[i]) & (c.bytes - 1))
      throw Fault(kFaultMisaligned,
                  format("cp.async of %u bytes from 0x%llx to shared 0x%llx", c.bytes, (unsigned long long)src[i],
                         (unsigned long long)d),
                  i);
    uint32_t o;
    Block* b = sharedTarget(w, d, c.bytes, i, o);
    if (b != w.block) throw Fault(kFaultIllegalAddress, "cp.async into the shared memory of another block", i);
    if (n) {
      checkGlobal(src[i], n, Access::Read, i, "cp.async global");
      reading |= 1u << i;
    }
    off[i] = c.dst[i] = o;
    addr[i] = c.src[i] = src[i];
    c.srcBytes[i] = n;
    c.group[i] = w.cpGroup[i];
    w.st->cpAsyncBytes += n;
  });
  if (reading) {
    w.st->globalLoadRequests++;
    w.st->globalLoadSectors += countSectors(addr, reading, c.bytes);
    eachLane(reading, [&](int i) { w.st->readSet.touch(src[i], c.srcBytes[i]); });
  }
  uint32_t waves, ideal;
  bankWavefronts(off, w.m, c.bytes, waves, ideal);
  w.st->sharedRequests++;
  w.st->sharedWavefronts += waves;
  w.st->sharedExcess += waves - ideal;
  if (w.launch->raceOn) {
    c.issued = w.vc;
    eachLane(w.m, [&](int i) { checkPending(w, *w.block, c.dst[i], c.bytes, I.line, true, c.src[i], c.srcBytes[i]); });
    eachLane(w.m, [&](int i) { markPending(*w.block, c.dst[i], c.bytes, w.clockId, I.line, c.src[i], c.srcBytes[i]); });
  }
  if (w.launch->asyncEarly())
    for (CpAsync& e : w.cpAsync) {
      uint32_t now = e.mask & w.m & ~e.landed;
      if (now) moveBytes(w, e, now);
      e.landed |= now;
    }
}
void commitH(Warp& w, const Inst&) {
  eachLane(w.m, [&](int i) { w.cpGroup[i]++; });
}
void waitGroupH(Warp& w, const Inst& I) {
  const uint32_t n = (uint32_t)I.imm;
  uint32_t due[32] = {}, lanes = 0;
  eachLane(w.m, [&](int i) {
    if (w.cpGroup[i] <= n) return;
    due[i] = w.cpGroup[i] - n - 1;  // groups are numbered from 0
    lanes |= 1u << i;
  });
  if (lanes) landCopies(w, lanes, due, ~0ull);
}
void waitAllH(Warp& w, const Inst&) {
  landAllCpAsync(w, w.m);
}

OpcodeEntry eCp({"cp"}, [](Decoder& d) {
  if (d.has("bulk")) return decodeBulk(d);  // also cp.reduce.async.bulk
  if (!d.mod(1, "async")) d.fail("unknown instruction '" + d.opcode() + "'");
  if (d.has("mbarrier")) return decodeCpAsyncMbarrier(d);
  if (d.has("commit_group")) {
    d.emit(commitH, Cls::Async);
    return;
  }
  if (d.has("wait_all")) {
    d.emit(waitAllH, Cls::Async);
    return;
  }
  if (d.has("wait_group")) {
    if (d.arg(0).kind != PtxOperand::Imm) d.fail("the group count must be an immediate");
    d.emit(waitGroupH, Cls::Async).imm = (int64_t)d.arg(0).bits;
    return;
  }
  for (size_t i = 2; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    if (!isCacheModifier(s) && s != "shared" && s != "shared::cta" && s != "global")
      d.fail("modifier '." + s + "' is not supported");
  }
  bool policy = d.has("L2::cache_hint");
  int64_t dd, ds;
  Operand dst = d.addressBase(d.arg(0), dd, Space::Shared), src = d.addressBase(d.arg(1), ds, Space::Global), size, ign;
  if (d.arg(2).kind != PtxOperand::Imm) d.fail("the copy size must be an immediate");
  uint32_t bytes = (uint32_t)d.arg(2).bits;
  if (bytes != 4 && bytes != 8 && bytes != 16) d.fail("the copy size must be 4, 8 or 16");
  if (d.has("cg") && bytes != 16) d.fail("cp.async.cg copies 16 bytes");
  size_t n = d.nargs() - (policy ? 1 : 0);
  if (n > 3) {
    const PtxOperand& x = d.arg(3);
    bool pred = x.kind == PtxOperand::Reg && d.fn->regs[x.reg].type == Ty::Pred;
    if (pred)
      ign = d.predSrc(x);
    else
      size = d.src(x, Ty::U32);
  }
  Inst& in = d.emit(cpAsyncH, Cls::Async, {dst, src, size, ign});
  in.imm = dd;
  in.imm2 = ds;
  in.sub = (uint8_t)bytes;
});

}  // namespace
}  // namespace cudasim
