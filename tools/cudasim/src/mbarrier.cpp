// mbarrier (PTX ISA, "Parallel Synchronization and Communication Instructions:
// mbarrier"). The 64-bit object holds: expected count [0,20), pending count
// [20,40), phase parity 40, tx-count [41,62) signed, tag [62,64) = 2. The tag
// tells an initialised object from the shared-memory poison.
#include "async.h"
#include "decoder.h"
#include "exec_memory.h"
#include "lanes.h"

namespace cudasim {

namespace {
struct State {
  uint32_t expected, pending, phase;
  int32_t tx;
};
constexpr uint64_t kTag = 2;
constexpr uint32_t kMaxCount = (1u << 20) - 1;
uint64_t pack(const State& s) {
  return (uint64_t)s.expected | (uint64_t)s.pending << 20 | (uint64_t)s.phase << 40 |
         ((uint64_t)(uint32_t)s.tx & 0x1fffff) << 41 | kTag << 62;
}
bool unpack(uint64_t v, State& s) {
  s.expected = v & kMaxCount;
  s.pending = v >> 20 & kMaxCount;
  s.phase = v >> 40 & 1;
  s.tx = (int32_t)((uint32_t)(v >> 41 & 0x1fffff) << 11) >> 11;
  return v >> 62 == kTag;
}
State load(Block& b, uint32_t off, int lane) {
  uint64_t v;
  memcpy(&v, b.sharedPtr(off), 8);
  State s;
  if (!unpack(v, s))
    throw Fault(kFaultIllegalInstruction, format("shared offset %u holds no initialised mbarrier", off - kSharedBase),
                lane);
  return s;
}
void store(Block& b, uint32_t off, const State& s) {
  uint64_t v = pack(s);
  memcpy(b.sharedPtr(off), &v, 8);
}
void completeIfDone(Block& b, uint32_t off, State& s) {
  if (s.pending == 0 && s.tx == 0) {
    s.phase ^= 1;
    s.pending = s.expected;
    if (b.launch->raceOn) {
      MbarrierSync& y = b.mbarSync[off];
      joinClock(y.doneVc, y.vc);
      joinClock(y.doneProxy, y.proxy);
    }
    b.launch->progress++;
  }
  store(b, off, s);
}
void arrive(Block& b, uint32_t off, uint32_t count, int lane) {
  State s = load(b, off, lane);
  if (count > s.pending)
    throw Fault(kFaultIllegalInstruction,
                format("%u arrivals at the mbarrier at shared offset %u, which expects only %u more in this phase",
                       count, off - kSharedBase, s.pending),
                lane);
  s.pending -= count;
  completeIfDone(b, off, s);
}
void addTx(Block& b, uint32_t off, int64_t bytes, int lane) {
  State s = load(b, off, lane);
  int64_t t = (int64_t)s.tx + bytes;
  if (t < -((1 << 20) - 1) || t > (1 << 20) - 1)
    throw Fault(kFaultIllegalInstruction, "mbarrier tx-count out of range", lane);
  s.tx = (int32_t)t;
  store(b, off, s);
}
}  // namespace

MbarAddress mbarAddress(Warp& w, uint64_t addr, int lane) {
  if ((addr & kWindowMask) == kSharedWindow) addr &= ~kWindowMask;
  if (addr & 7)
    throw Fault(kFaultMisaligned, format("mbarrier at misaligned shared address 0x%llx", (unsigned long long)addr),
                lane);
  MbarAddress a;
  a.block = sharedTarget(w, addr, 8, lane, a.off);
  return a;
}
void mbarCompleteTx(Block& b, uint32_t off, uint32_t bytes) {
  addTx(b, off, -(int64_t)bytes, -1);
  State s = load(b, off, -1);
  completeIfDone(b, off, s);
}
void mbarArriveCount(Block& b, uint32_t off, uint32_t count) {
  arrive(b, off, count, -1);
}
void queueOnMbarrier(Block& b, uint32_t off, std::function<void()> run) {
  b.mbarPending[off].push_back({std::move(run)});
}
void landMbarrier(Block& b, uint32_t off) {
  auto it = b.mbarPending.find(off);
  if (it == b.mbarPending.end()) return;
  std::deque<PendingAsync> q = std::move(it->second);
  b.mbarPending.erase(it);
  for (auto& p : q) p.run();
}
int asyncEngine(const Block& b, uint32_t off) {
  return b.cluster->warpClocks + (int)((off / 8 + 5 * b.rank) % kAsyncEngines);
}

namespace {

enum Kind : uint8_t { Init, Inval, Arrive, ArriveDrop, ArriveTx, ExpectTx, CompleteTx, TestWait, TryWait };

// op: result (state or predicate), address, count / state / parity
void mbarH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[1], I.imm, addr);
  uint32_t done = 0;
  const bool poll = I.sub == TestWait || I.sub == TryWait;
  eachLane(w.m, [&](int i) {
    MbarAddress a = mbarAddress(w, addr[i], i);
    Block& b = *a.block;
    auto operand = [&](uint32_t d) { return I.op[2].present ? w.reg<uint32_t>(I.op[2])[i] : d; };
    auto result = [&](uint64_t v) {
      if (I.op[0].present) w.reg<uint64_t>(I.op[0])[i] = v;
    };
    auto sync = [&] {
      if (w.launch->raceOn) {
        MbarrierSync& y = b.mbarSync[a.off];
        release(w, y.vc, y.proxy);
        laneSync(w, ~0u);
      }
    };
    switch ((Kind)I.sub) {
      case Init: {
        uint32_t n = operand(1);
        if (n == 0 || n > kMaxCount) throw Fault(kFaultIllegalInstruction, format("mbarrier.init with count %u", n), i);
        store(b, a.off, {n, n, 0, 0});
        b.mbarSync.erase(a.off);
        w.launch->progress++;
        break;
      }
      case Inval:
        load(b, a.off, i);
        memset(b.sharedPtr(a.off), 0xff, 8);
        break;
      case Arrive:
      case ArriveTx:
      case ArriveDrop: {
        sync();
        if (I.sub == ArriveTx) addTx(b, a.off, operand(0), i);
        State s = load(b, a.off, i);
        result(pack(s));
        if (I.sub == ArriveDrop) {
          uint32_t n = operand(1);
          if (n > s.expected) throw Fault(kFaultIllegalInstruction, "mbarrier.arrive_drop below zero", i);
          s.expected -= n;
          store(b, a.off, s);
          arrive(b, a.off, n, i);
        } else {
          arrive(b, a.off, I.sub == ArriveTx ? 1 : operand(1), i);
        }
        break;
      }
      case ExpectTx: addTx(b, a.off, operand(0), i); break;
      case CompleteTx: mbarCompleteTx(b, a.off, operand(0)); break;
      case TestWait:
      case TryWait: {
        auto complete = [&] {
          State s = load(b, a.off, i);
          if (I.sub2) return s.phase != (operand(0) & 1);
          State old;
          if (!unpack(w.reg<uint64_t>(I.op[2])[i], old))
            throw Fault(kFaultIllegalInstruction, "the state operand is no mbarrier state", i);
          return s.phase != old.phase;
        };
        bool ok = complete();
        if (!ok && b.mbarPending.count(a.off)) {
          landMbarrier(b, a.off);
          ok = complete();
        }
        if (ok) {
          done |= 1u << i;
          if (w.launch->raceOn) {
            MbarrierSync& y = b.mbarSync[a.off];
            acquire(w, y.doneVc, y.doneProxy);
            laneSync(w, ~0u);
          }
        }
        break;
      }
    }
  });
  if (poll) {
    w.setPred(I.op[0], done);
    if (done != w.m) {
      w.polled = true;
      w.ev = Event::Yield;
    }
  }
}

void pendingCountH(Warp& w, const Inst& I) {
  const uint64_t* s = w.reg<uint64_t>(I.op[1]);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  eachLane(w.m, [&](int i) {
    State x;
    unpack(s[i], x);
    d[i] = x.pending;
  });
}

OpcodeEntry eMbarrier({"mbarrier"}, [](Decoder& d) {
  d.allow({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "parity",
           "pending_count", "shared", "shared::cta", "shared::cluster", "release", "acquire", "relaxed", "cta",
           "cluster", "noComplete"});
  if (d.has("pending_count")) {
    Operand s = d.src(d.arg(1), Ty::B64);
    d.emit(pendingCountH, Cls::Barrier, {d.dst(d.arg(0), Ty::U32), s});
    return;
  }
  Kind k = d.has("init")          ? Init
           : d.has("inval")       ? Inval
           : d.has("test_wait")   ? TestWait
           : d.has("try_wait")    ? TryWait
           : d.has("arrive_drop") ? ArriveDrop
           : d.has("arrive")      ? (d.has("expect_tx") ? ArriveTx : Arrive)
           : d.has("expect_tx")   ? ExpectTx
                                  : CompleteTx;
  Operand res, val;
  size_t i = 0;
  if (k == TestWait || k == TryWait)
    res = d.predDst(d.arg(i++));
  else if (d.arg(0).kind != PtxOperand::Address) {
    if (d.arg(0).kind != PtxOperand::Sink) res = d.dst(d.arg(0), Ty::B64);
    i++;
  }
  int64_t disp;
  Operand base = d.addressBase(d.arg(i++), disp, Space::Shared);
  bool parity = d.has("parity");
  if (i < d.nargs()) val = d.src(d.arg(i), (k == TestWait || k == TryWait) && !parity ? Ty::B64 : Ty::B32);
  Inst& in = d.emit(mbarH, Cls::Barrier, {res, base, val});
  in.imm = disp;
  in.sub = k;
  in.sub2 = parity;
});

// cp.async.mbarrier.arrive: arrives once the thread's earlier cp.async are
// complete. Without .noinc the pending count is raised first.
void cpMbarH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  const uint64_t seq = w.cpSeq;
  Warp* wp = &w;
  eachLane(w.m, [&](int i) {
    MbarAddress a = mbarAddress(w, addr[i], i);
    if (!I.sub) {
      State s = load(*a.block, a.off, i);
      s.pending++;
      store(*a.block, a.off, s);
    }
    queueOnMbarrier(*a.block, a.off, [wp, a, i, seq] {
      landAllCpAsync(*wp, 1u << i, seq);
      if (wp->launch->raceOn) {
        MbarrierSync& y = a.block->mbarSync[a.off];
        release(*wp, y.vc, y.proxy);
      }
      arrive(*a.block, a.off, 1, i);
    });
  });
}
}  // namespace

void decodeCpAsyncMbarrier(Decoder& d) {
  d.allow({"async", "mbarrier", "arrive", "noinc", "shared", "shared::cta"});
  int64_t disp;
  Operand base = d.addressBase(d.arg(0), disp, Space::Shared);
  Inst& in = d.emit(cpMbarH, Cls::Async, {base});
  in.imm = disp;
  in.sub = d.has("noinc");
}

}  // namespace cudasim
