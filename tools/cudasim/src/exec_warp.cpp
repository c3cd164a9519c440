// Warp-level collectives, block and cluster barriers, fences (PTX ISA,
// "Parallel Synchronization and Communication Instructions").
#include "decoder.h"
#include "exec_memory.h"
#include "lane_race.h"
#include "lanes.h"

namespace cudasim {
namespace {

uint32_t memberMask(Warp& w, const Operand& o) {
  return (uint32_t)w.uniform(o);
}

// Every .sync collective starts with this.
bool collective(Warp& w, const Operand& o, uint32_t& members, bool warpBarrier = false) {
  members = memberMask(w, o);
  uint32_t outside = w.m & ~members;
  if (outside)
    throw Fault(
        kFaultIllegalInstruction,
        format("lanes %08x execute a .sync instruction whose member mask %08x does not name them", outside, members),
        __builtin_ctz(outside));
  return converge(w, members, warpBarrier);
}

// Tiles of a warp may execute one instruction with a member mask each; every
// tile acts by itself, and those that are not complete wait.
template <Handler H, int MaskOp>
void byMask(Warp& w, const Inst& I) {
  const Operand& o = I.op[MaskOp];
  const uint32_t* mask = w.reg<uint32_t>(o);
  uint32_t differ = 0;
  if (o.present && o.file == 0) eachLane(w.m, [&](int i) { differ |= mask[i] ^ mask[w.firstLane()]; });
  if (!differ) return H(w, I);
  const uint32_t all = w.m;
  uint32_t masks[32], waiting = 0, need = 0;
  eachLane(all, [&](int i) { masks[i] = mask[i]; });
  for (uint32_t todo = all; todo;) {
    uint32_t tile = 0, members = masks[__builtin_ctz(todo)];
    eachLane(todo, [&](int i) {
      if (masks[i] == members) tile |= 1u << i;
    });
    todo &= ~tile;
    if (members & w.live & ~tile) {
      waiting |= tile;
      need |= members;
      continue;
    }
    w.m = tile;
    H(w, I);
  }
  w.m = all;
  if (!waiting) return;
  // Lanes that wait here already may complete a tile: all of them look again.
  for (auto& g : w.others)
    if (g.state == Group::Sync && g.pc == w.pc) need = 0;
  w.m = waiting;
  w.syncNeed = need;
  w.syncWarpBarrier = false;
  w.ev = Event::WaitSync;
}

// A reduction by shfl.up or .down often ignores what the lanes at the edge get,
// so that there it is a remark only.
void reportAbsent(Warp& w, const Inst& I, int lane, uint32_t members) {
  std::string s = format("shfl.sync reads lane %d, which %s (the result is undefined)", lane,
                         members >> lane & 1 ? "has exited or does not exist" : "is not in the member mask");
  if (I.sub <= 1)
    noteOnce(w, s, I.line, 0);
  else
    noteHazard(w, s, I.line, 0);
}

// op: d, p, a, b, c, membermask; sub: 0 up 1 down 2 bfly 3 idx
void shflH(Warp& w, const Inst& I) {
  uint32_t members;
  if (I.op[5].present && !collective(w, I.op[5], members)) return;
  const uint32_t *a = w.reg<uint32_t>(I.op[2]), *b = w.reg<uint32_t>(I.op[3]), *c = w.reg<uint32_t>(I.op[4]);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  uint32_t res[32], p = 0;
  int absent = -1;
  for (int i = 0; i < 32; i++) {
    uint32_t bv = b[i] & 31, cv = c[i] & 31, seg = c[i] >> 8 & 31;
    int maxLane = (i & seg) | (cv & ~seg), minLane = i & seg, j;
    bool ok;
    switch (I.sub) {
      case 0:
        j = i - (int)bv;
        ok = j >= maxLane;
        break;
      case 1:
        j = i + (int)bv;
        ok = j <= maxLane;
        break;
      case 2:
        j = i ^ (int)bv;
        ok = j <= maxLane;
        break;
      default:
        j = minLane | (bv & ~seg);
        ok = j <= maxLane;
        break;
    }
    if (!ok) j = i;
    // Reading a lane that does not take part is undefined; the poison shows.
    res[i] = w.m >> j & 1 ? a[j] : 0xffffffffu;
    if (!(w.m >> j & 1) && (w.m >> i & 1)) absent = j;
    p |= ok ? 1u << i : 0;
  }
  CUDASIM_LANES(res[i]);
  w.setPred(I.op[1], p);
  if (absent >= 0 && I.op[5].present) reportAbsent(w, I, absent, members);
}
OpcodeEntry eShfl({"shfl"}, [](Decoder& d) {
  d.allow({"sync", "up", "down", "bfly", "idx"});
  Operand a = d.src(d.arg(1), Ty::B32), b = d.src(d.arg(2), Ty::B32), c = d.src(d.arg(3), Ty::B32), mm;
  if (d.has("sync")) mm = d.src(d.arg(4), Ty::B32);
  Operand dst, p;
  if (d.arg(0).pipe) {
    dst = d.dst(d.arg(0).list[0], Ty::B32);
    p = d.predDst(d.arg(0).list[1]);
  } else
    dst = d.dst(d.arg(0), Ty::B32);
  d.emit(byMask<shflH, 5>, Cls::Shuffle, {dst, p, a, b, c, mm}).sub = d.has("up")     ? 0
                                                                      : d.has("down") ? 1
                                                                      : d.has("bfly") ? 2
                                                                                      : 3;
});

// sub: 0 all 1 any 2 uni 3 ballot
void voteH(Warp& w, const Inst& I) {
  uint32_t members;
  if (I.op[2].present && !collective(w, I.op[2], members)) return;
  uint32_t v = w.pred(I.op[1]) & w.m;
  if (I.sub == 3) {
    uint32_t* d = w.reg<uint32_t>(I.op[0]);
    CUDASIM_LANES(v);
    return;
  }
  bool r = I.sub == 0 ? v == w.m : I.sub == 1 ? v != 0 : v == 0 || v == w.m;
  w.setPred(I.op[0], r ? ~0u : 0);
}
OpcodeEntry eVote({"vote"}, [](Decoder& d) {
  d.allow({"sync", "all", "any", "uni", "ballot"});
  Operand a = d.predSrc(d.arg(1)), mm;
  if (d.has("sync")) mm = d.src(d.arg(2), Ty::B32);
  bool ballot = d.has("ballot");
  Operand dst = ballot ? d.dst(d.arg(0), Ty::B32) : d.predDst(d.arg(0));
  d.emit(byMask<voteH, 2>, Cls::Shuffle, {dst, a, mm}).sub = ballot ? 3 : d.has("all") ? 0 : d.has("any") ? 1 : 2;
});
void activemaskH(Warp& w, const Inst& I) {
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  const uint32_t v = w.m;
  CUDASIM_LANES(v);
}
OpcodeEntry eActive({"activemask"}, [](Decoder& d) { d.emit(activemaskH, Cls::Shuffle, {d.dst(d.arg(0), Ty::B32)}); });

// sub: 0 any 1 all
template <class T>
void matchH(Warp& w, const Inst& I) {
  uint32_t members;
  if (!collective(w, I.op[3], members)) return;
  const T* a = w.reg<T>(I.op[2]);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  uint32_t res[32] = {};
  eachLane(w.m, [&](int i) {
    eachLane(w.m, [&](int j) {
      if (a[i] == a[j]) res[i] |= 1u << j;
    });
  });
  if (I.sub) {
    bool all = res[w.firstLane()] == w.m;
    CUDASIM_LANES(all ? w.m : 0);
    w.setPred(I.op[1], all ? ~0u : 0);
  } else {
    CUDASIM_LANES(res[i]);
  }
}
OpcodeEntry eMatch({"match"}, [](Decoder& d) {
  d.allow({"any", "all", "sync"});
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t), mm = d.src(d.arg(2), Ty::B32), dst, p;
  if (d.arg(0).pipe) {
    dst = d.dst(d.arg(0).list[0], Ty::B32);
    p = d.predDst(d.arg(0).list[1]);
  } else
    dst = d.dst(d.arg(0), Ty::B32);
  d.emit(tySize(t) == 8 ? byMask<matchH<uint64_t>, 3> : byMask<matchH<uint32_t>, 3>, Cls::Shuffle, {dst, p, a, mm})
      .sub = d.has("all");
});

// sub: 0 add 1 min 2 max 3 and 4 or 5 xor; sub2: 0 unsigned 1 signed 2 f32; sub3: abs, NaN flags
void reduxH(Warp& w, const Inst& I) {
  uint32_t members;
  if (!collective(w, I.op[2], members)) return;
  const uint32_t* a = w.reg<uint32_t>(I.op[1]);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  uint32_t r = a[w.firstLane()];
  if (I.sub2 == 2) {
    float acc = NAN;
    bool nan = false;
    eachLane(w.m, [&](int i) {
      float f;
      memcpy(&f, &a[i], 4);
      if (I.sub3 & 1) f = std::fabs(f);
      nan |= f != f;
      acc = acc != acc ? f : f != f ? acc : I.sub == 1 ? std::fmin(acc, f) : std::fmax(acc, f);
    });
    if (nan && (I.sub3 & 2)) acc = NAN;
    memcpy(&r, &acc, 4);
    if (acc != acc) r = 0x7fffffff;
  } else {
    eachLane(w.m & (w.m - 1), [&](int i) {
      uint32_t v = a[i];
      bool less = I.sub2 ? (int32_t)v < (int32_t)r : v < r;
      switch (I.sub) {
        case 0: r += v; break;
        case 1:
          if (less) r = v;
          break;
        case 2:
          if (!less) r = v;
          break;
        case 3: r &= v; break;
        case 4: r |= v; break;
        default: r ^= v; break;
      }
    });
  }
  CUDASIM_LANES(r);
}
OpcodeEntry eRedux({"redux"}, [](Decoder& d) {
  d.allow({"sync", "add", "min", "max", "and", "or", "xor", "abs", "NaN"});
  Ty t = d.type();
  Operand a = d.src(d.arg(1), t), mm = d.src(d.arg(2), Ty::B32);
  Inst& in = d.emit(byMask<reduxH, 2>, Cls::Shuffle, {d.dst(d.arg(0), t), a, mm});
  in.sub = d.has("add") ? 0 : d.has("min") ? 1 : d.has("max") ? 2 : d.has("and") ? 3 : d.has("or") ? 4 : 5;
  in.sub2 = t == Ty::F32 ? 2 : t == Ty::S32 ? 1 : 0;
  in.sub3 = (d.has("abs") ? 1 : 0) | (d.has("NaN") ? 2 : 0);
});
void electH(Warp& w, const Inst& I) {
  uint32_t members;
  if (!collective(w, I.op[2], members)) return;
  const uint32_t leader = __builtin_ctz(w.m);
  uint32_t* d = w.reg<uint32_t>(I.op[0]);
  if (I.op[0].present) CUDASIM_LANES(leader);
  w.setPred(I.op[1], 1u << leader);
}
OpcodeEntry eElect({"elect"}, [](Decoder& d) {
  d.allow({"sync"});
  Operand mm = d.src(d.arg(1), Ty::B32), dst, p;
  if (!d.arg(0).pipe) d.fail("elect.sync needs d|p");
  if (d.arg(0).list[0].kind != PtxOperand::Sink) dst = d.dst(d.arg(0).list[0], Ty::B32);
  p = d.predDst(d.arg(0).list[1]);
  d.emit(byMask<electH, 2>, Cls::Shuffle, {dst, p, mm});
});

// --- barriers
void warpBarrierH(Warp& w, const Inst& I) {
  uint32_t members;
  collective(w, I.op[0], members, true);
}

// op: result, barrier, count, predicate. sub: 0 sync 1 arrive; sub2: 0 none 1 popc 2 and 3 or
void barrierH(Warp& w, const Inst& I) {
  uint32_t id = (uint32_t)w.uniform(I.op[1]);
  if (id > 15) throw Fault(kFaultIllegalInstruction, format("barrier %u does not exist", id), w.firstLane());
  Block& b = *w.block;
  BlockBarrier& x = b.bars[id];
  uint32_t count = I.op[2].present ? (uint32_t)w.uniform(I.op[2]) : 0;
  if (count % 32)
    throw Fault(kFaultIllegalInstruction, format("barrier count %u is not a multiple of the warp size", count),
                w.firstLane());
  if (x.arrived == 0)
    x.expected = count;
  else if (x.expected != count)
    throw Fault(kFaultIllegalInstruction,
                format("barrier %u is used with counts %u and %u at a time", id, x.expected, count), w.firstLane());
  if (id == 0 && !x.waiters.empty() && x.waiters[0].inst->line != I.line && x.waiters[0].warp != &w)
    noteOnce(w, "warps of a block wait at different places for barrier 0", x.waiters[0].inst->line, I.line);
  // With a count, whole warps are counted even when some of their lanes have ended.
  x.arrived += count && w.m == w.live ? 32 : __builtin_popcount(w.m);
  if (I.sub2) {
    uint32_t p = w.pred(I.op[3]) & w.m;
    x.redPop += __builtin_popcount(p);
    x.redOr |= p != 0;
    x.redAnd &= p == w.m;
  }
  release(w, x.vc, x.proxy);
  if (count && x.arrived > count)
    throw Fault(kFaultIllegalInstruction,
                format("%u threads arrived at barrier %u, which expects %u", x.arrived, id, count), w.firstLane());
  w.st->barriers++;
  if (I.sub == 0) {
    x.waiters.push_back({&w, w.m, w.pc, &I});
    waitAtBarrier(w, w.pc + 1);
  }
  checkBarrier(b, (int)id);
}
void decodeBarrier(Decoder& d) {
  if (d.has("warp")) {
    Operand m = d.src(d.arg(0), Ty::B32);
    d.emit(byMask<warpBarrierH, 0>, Cls::Barrier, {m});
    return;
  }
  d.allow({"cta", "sync", "arrive", "red", "popc", "and", "or", "aligned"});
  bool red = d.has("red"), arrive = d.has("arrive");
  size_t i = red ? 1 : 0;
  Operand res, id, count, p;
  id = d.src(d.arg(i++), Ty::U32);
  bool hasCount = d.nargs() > i && !(red && d.nargs() == i + 1);
  if (hasCount) count = d.src(d.arg(i++), Ty::U32);
  uint8_t kind = 0;
  if (red) {
    p = d.predSrc(d.arg(i));
    kind = d.has("popc") ? 1 : d.has("and") ? 2 : 3;
    res = kind == 1 ? d.dst(d.arg(0), Ty::U32) : d.predDst(d.arg(0));
  }
  Inst& in = d.emit(barrierH, Cls::Barrier, {res, id, count, p});
  in.sub = arrive;
  in.sub2 = kind;
}
void clusterArriveH(Warp& w, const Inst& I) {
  Cluster& c = *w.block->cluster;
  eachLane(w.m, [&](int i) { w.clusterPhase[i] = c.phase + 1; });
  c.arrived += __builtin_popcount(w.m);
  if (!I.sub) release(w, c.vc, c.proxy);
  w.st->barriers++;
  checkClusterBarrier(c);
}
void clusterWaitH(Warp& w, const Inst&) {
  Cluster& c = *w.block->cluster;
  bool ready = true;
  eachLane(w.m, [&](int i) { ready &= (int32_t)(c.phase - w.clusterPhase[i]) >= 0; });
  if (ready) {
    acquire(w, c.doneVc, c.doneProxy);
    laneSync(w, ~0u);
    return;
  }
  c.waiters.push_back({&w, w.m, w.pc, nullptr});
  waitAtBarrier(w, w.pc);
}
OpcodeEntry eBar({"bar", "barrier"}, [](Decoder& d) {
  if (d.mod(1, "cluster")) {
    d.allow({"cluster", "arrive", "wait", "aligned", "release", "relaxed", "acquire"});
    if (d.has("arrive"))
      d.emit(clusterArriveH, Cls::Barrier).sub = d.has("relaxed");
    else
      d.emit(clusterWaitH, Cls::Barrier);
    return;
  }
  decodeBarrier(d);
});

void fenceH(Warp&, const Inst&) {}
void proxyFenceH(Warp& w, const Inst&) {
  proxyFence(w);
}
OpcodeEntry eFence({"membar", "fence"}, [](Decoder& d) {
  bool async = false;
  for (auto& s : d.p->op) async |= s == "async" || s.rfind("async::", 0) == 0;
  d.emit(async ? proxyFenceH : fenceH, Cls::Barrier);
});

}  // namespace
}  // namespace cudasim
