// Warp and block scheduling.
//
// Divergence: the lanes of a warp form groups with one pc each, and the
// runnable group with the lowest pc goes first, so that groups meet again at
// the earliest common instruction. Callees are linked below their callers,
// which makes calls return before the caller goes on. A group that spins does
// not starve the others: after some slices another group gets a turn.
//
// Blocks run one cluster at a time; a further one becomes resident when the
// running ones only spin, since they may wait for it.
#include <chrono>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <thread>

#include <algorithm>

#include "exec_memory.h"
#include "lanes.h"
#include "machine.h"
#include "memory.h"
#include "module.h"

namespace cudasim {

namespace {

constexpr uint64_t kSpinLimit = 200000000;      // warp instructions without progress
constexpr uint64_t kMoreBlocksAfter = 2000000;  // likewise, before another cluster starts
constexpr int kStallRounds = 300;               // rounds in which every warp only polled

thread_local Warp* tlWarp = nullptr;
thread_local sigjmp_buf* tlJump = nullptr;
thread_local uint64_t tlBadAddress = 0;

void onSegv(int sig, siginfo_t* info, void*) {
  if (tlJump) {
    tlBadAddress = (uint64_t)info->si_addr;
    siglongjmp(*tlJump, 1);
  }
  signal(sig, SIG_DFL);
  raise(sig);
}
void installSegvHandler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction sa = {};
    sa.sa_sigaction = onSegv;
    sa.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &sa, nullptr);
    sigaction(SIGBUS, &sa, nullptr);
  });
}

void addGroup(Warp& w, uint32_t pc, uint32_t mask) {
  for (auto& g : w.others)
    if (g.state == Group::Run && g.pc == pc) {
      g.mask |= mask;
      return;
    }
  Group g;
  g.pc = pc;
  g.mask = mask;
  w.others.push_back(g);
}

// Makes the best runnable group current; false when there is none.
bool pickGroup(Warp& w) {
  int best = -1;
  for (size_t i = 0; i < w.others.size(); i++)
    if (w.others[i].state == Group::Run && (best < 0 || w.others[i].pc < w.others[best].pc)) best = (int)i;
  if (best < 0) {
    w.hasCurrent = false;
    w.active = 0;
    return false;
  }
  w.pc = w.others[best].pc;
  w.active = w.others[best].mask;
  w.others.erase(w.others.begin() + best);
  w.hasCurrent = true;
  w.minOther = ~0u;
  for (size_t i = 0; i < w.others.size();) {
    Group& g = w.others[i];
    if (g.state == Group::Run && g.pc == w.pc) {
      w.active |= g.mask;
      w.others.erase(w.others.begin() + i);
      continue;
    }
    if (g.state == Group::Run && g.pc < w.minOther) w.minOther = g.pc;
    i++;
  }
  return true;
}
bool switchGroup(Warp& w) {
  if (w.hasCurrent && w.active) addGroup(w, w.pc, w.active);
  w.hasCurrent = false;
  w.active = 0;
  return pickGroup(w);
}

void waitSync(Warp& w) {
  uint32_t rest = w.active & ~w.m;
  Group* at = nullptr;
  for (auto& g : w.others)
    if (g.state == Group::Sync && g.pc == w.pc) at = &g;
  if (!at) {
    w.others.emplace_back();
    at = &w.others.back();
    at->pc = w.pc;
    at->state = Group::Sync;
  }
  at->mask |= w.m;
  at->need = w.syncNeed;
  at->warpBarrier = w.syncWarpBarrier;
  if ((w.syncNeed & w.live & ~at->mask) == 0)
    at->state = Group::Run;
  else if (w.syncWarpBarrier) {
    // bar.warp.sync may be reached at different places of the program.
    uint32_t all = 0;
    for (auto& g : w.others)
      if (g.state == Group::Sync && g.warpBarrier && g.need == w.syncNeed) all |= g.mask;
    if ((w.syncNeed & w.live & ~all) == 0)
      for (auto& g : w.others)
        if (g.state == Group::Sync && g.warpBarrier && g.need == w.syncNeed) {
          g.state = Group::Run;
          g.pc++;
        }
    if ((w.syncNeed & w.live & ~all) == 0) laneSync(w, w.syncNeed & w.live);
  }
  w.active = 0;
  w.hasCurrent = false;
  if (rest) addGroup(w, w.pc + 1, rest);
}

void exitLanes(Warp& w) {
  uint32_t m = w.m;
  Block& b = *w.block;
  w.live &= ~m;
  w.active &= ~m;
  int n = __builtin_popcount(m);
  b.liveThreads -= n;
  b.cluster->liveThreads -= n;
  w.launch->progress++;
  for (auto& g : w.others)
    if (g.state == Group::Sync) g.state = Group::Run;  // they check again
  if (!w.live) b.liveWarps--;
  // The end of a thread orders its accesses before barriers that no longer wait for it.
  for (int i = 0; i < 16; i++)
    if (b.bars[i].arrived) {
      release(w, b.bars[i].vc, b.bars[i].proxy);
      checkBarrier(b, i);
    }
  if (b.cluster->blocks.size() > 1) {
    release(w, b.cluster->vc, b.cluster->proxy);
    checkClusterBarrier(*b.cluster);
  }
}

enum class SliceEnd { Budget, Blocked, Polled, Done };

SliceEnd runWarp(Warp& w, int budget) {
  const Inst* code = w.launch->kernel->code.data();
  Stats& st = *w.st;
  w.polled = false;
  if (!w.hasCurrent && !pickGroup(w)) return w.live ? SliceEnd::Blocked : SliceEnd::Done;
  w.minOther = ~0u;
  for (auto& g : w.others)  // groups may have been woken since
    if (g.state == Group::Run && g.pc < w.minOther) w.minOther = g.pc;
  if (w.minOther != ~0u && ++w.slicesSinceSwitch > 64) {
    // Another group gets a slice although its pc is higher.
    w.slicesSinceSwitch = 0;
    size_t n = 0, pick = w.launch->rng() % w.others.size();
    for (size_t i = 0; i < w.others.size(); i++) {
      size_t k = (pick + i) % w.others.size();
      if (w.others[k].state == Group::Run) {
        n = k;
        break;
      }
    }
    if (w.others[n].state == Group::Run) {
      Group g = w.others[n];
      w.others.erase(w.others.begin() + n);
      if (w.active) addGroup(w, w.pc, w.active);
      w.pc = g.pc;
      w.active = g.mask;
      w.minOther = ~0u;  // undisturbed until the slice ends
      w.forcedSlices = 1;
    }
  }
  int left = budget;
  while (left-- > 0) {
    const Inst& I = code[w.pc];
    uint32_t m = w.active;
    if (I.guard != kNoGuard) m &= *(const uint32_t*)(w.base[0] + I.guard) ^ I.guardXor;
    w.m = m;
    w.npc = w.pc + 1;
    st.cls[(int)I.cls]++;
    st.warpInsts++;
    st.threadInsts += __builtin_popcount(m);
    if (m) {
      I.fn(w, I);
      if (__builtin_expect(w.ev != Event::None, 0)) {
        Event e = w.ev;
        w.ev = Event::None;
        switch (e) {
          case Event::Diverge: {
            uint32_t rest = w.active & ~w.splitMask;
            addGroup(w, w.splitPc, w.splitMask);
            w.active = rest;
            w.pc = w.npc;
            switchGroup(w);
            continue;
          }
          case Event::Exit:
            exitLanes(w);
            w.pc = w.npc;
            if (!w.active) {
              w.hasCurrent = false;
              if (!pickGroup(w)) goto stopped;
            }
            continue;
          case Event::WaitSync:
            waitSync(w);
            if (!pickGroup(w)) goto stopped;
            continue;
          case Event::WaitBar: {
            // The group was queued by the barrier; lanes that skipped it go on.
            uint32_t rest = w.active & ~w.m;
            w.active = 0;
            w.hasCurrent = false;
            if (rest) addGroup(w, w.pc + 1, rest);
            if (!pickGroup(w)) goto stopped;
            continue;
          }
          case Event::Yield:
            w.pc = w.npc;
            if (w.minOther != ~0u) switchGroup(w);
            w.issued += budget - left;
            w.launch->instructions += budget - left;
            return w.polled ? SliceEnd::Polled : SliceEnd::Budget;
          default: break;
        }
      }
    }
    w.pc = w.npc;
    if (__builtin_expect(w.pc >= w.minOther, 0)) {
      switchGroup(w);
      w.slicesSinceSwitch = 0;
    }
  }
stopped:
  w.issued += budget - left;
  w.launch->instructions += budget - left;
  if (w.forcedSlices) {
    w.forcedSlices = 0;
    if (w.hasCurrent) switchGroup(w);
  }
  if (!w.live) return SliceEnd::Done;
  return w.hasCurrent ? SliceEnd::Budget : SliceEnd::Blocked;
}

std::string where(Warp& w, int lane) {
  Launch& l = *w.launch;
  const Inst& I = l.kernel->code[std::min<size_t>(w.pc, l.kernel->code.size() - 1)];
  uint32_t t = (uint32_t)(w.id * 32 + (lane >= 0 ? lane : w.m ? w.firstLane() : 0));
  const uint32_t* b = l.cfg.block;
  return format("kernel %s, block (%u,%u,%u), thread (%u,%u,%u), PTX line %d: %s", l.kernel->title.c_str(),
                w.block->idx[0], w.block->idx[1], w.block->idx[2], t % b[0], t / b[0] % b[1], t / (b[0] * b[1]), I.line,
                l.kernel->module->ptx->lineText(I.line).c_str());
}

[[noreturn]] void deadlock(Launch& l, const char* why) {
  std::string s = format("%s in kernel %s:", why, l.kernel->title.c_str());
  int shown = 0;
  for (auto& c : l.resident)
    for (auto& b : c->blocks)
      for (auto& w : b->warps) {
        if (!w->live || shown >= 48) continue;
        auto line = [&](uint32_t pc, uint32_t mask, const char* what) {
          const Inst& I = l.kernel->code[std::min<size_t>(pc, l.kernel->code.size() - 1)];
          s += format("\n    block (%u,%u,%u) warp %d lanes %08x %s PTX line %d: %s", b->idx[0], b->idx[1], b->idx[2],
                      w->id, mask, what, I.line, l.kernel->module->ptx->lineText(I.line).c_str());
          shown++;
        };
        if (w->hasCurrent && w->active) line(w->pc, w->active, "spins at");
        for (auto& g : w->others)
          line(g.state == Group::Bar && g.pc ? g.pc - 1 : g.pc, g.mask,
               g.state == Group::Bar    ? "waits at"
               : g.state == Group::Sync ? format("waits for lanes %08x at", g.need & w->live & ~g.mask).c_str()
                                        : "ready at");
      }
  Fault f(kFaultTimeout, s);
  f.located = true;
  throw f;
}

void setupBlock(Launch& l, Cluster& c, Block& b, uint64_t clusterLinear, int rank) {
  const LaunchConfig& g = l.cfg;
  Kernel& k = *l.kernel;
  uint32_t cg[3] = {g.grid[0] / g.cluster[0], g.grid[1] / g.cluster[1], g.grid[2] / g.cluster[2]};
  uint32_t ci[3] = {(uint32_t)(clusterLinear % cg[0]), (uint32_t)(clusterLinear / cg[0] % cg[1]),
                    (uint32_t)(clusterLinear / cg[0] / cg[1])};
  uint32_t r[3] = {rank % g.cluster[0], rank / g.cluster[0] % g.cluster[1], rank / (g.cluster[0] * g.cluster[1])};
  for (int i = 0; i < 3; i++) {
    b.idx[i] = ci[i] * g.cluster[i] + r[i];
    c.idx[i] = ci[i];
    c.dim[i] = g.cluster[i];
  }
  b.linear = b.idx[0] + (uint64_t)g.grid[0] * (b.idx[1] + (uint64_t)g.grid[1] * b.idx[2]);
  b.launch = &l;
  b.cluster = &c;
  b.rank = rank;
  b.done = false;
  uint32_t dyn = (k.staticShared + k.dynamicAlign - 1) / k.dynamicAlign * k.dynamicAlign;
  b.sharedEnd = g.dynamicShared ? dyn + g.dynamicShared : k.staticShared;
  b.shared.assign(b.sharedEnd - kSharedBase + 16, 0xff);
  b.liveThreads = (int)l.threads;
  b.liveWarps = (int)l.warpsPerBlock;
  b.mbarSync.clear();
  b.mbarPending.clear();
  b.globalRace.clear();
  b.wgmmaReads.assign((l.warpsPerBlock + 3) / 4, VClock());
  for (auto& x : b.bars) x = BlockBarrier();
  int nclk = c.warpClocks + kAsyncEngines;
  if (l.raceOn) b.race.prepare(b.sharedEnd - kSharedBase, c.warpClocks);
  b.warps.resize(l.warpsPerBlock);
  b.order.resize(l.warpsPerBlock);
  for (uint32_t i = 0; i < l.warpsPerBlock; i++) {
    b.order[i] = (int)i;
    if (!b.warps[i]) b.warps[i].reset(new Warp);
    std::vector<uint8_t> regs = std::move(b.warps[i]->regStore), local = std::move(b.warps[i]->localStore);
    *b.warps[i] = Warp();
    Warp& w = *b.warps[i];
    w.regStore = std::move(regs);
    w.localStore = std::move(local);
    w.regStore.assign(k.regBytes + 64, 0xff);
    w.localStore.assign((size_t)k.localBytes * 32 + 64, 0xff);
    w.base[0] = (uint8_t*)(((uintptr_t)w.regStore.data() + 63) & ~(uintptr_t)63);
    w.base[1] = k.consts.data();
    w.local = w.localStore.data();
    w.localBytes = k.localBytes;
    uint32_t n = std::min<uint32_t>(32, l.threads - i * 32);
    w.live = w.active = n == 32 ? ~0u : (1u << n) - 1;
    w.pc = k.entryPc;
    w.id = (int)i;
    w.clockId = rank * (int)l.warpsPerBlock + (int)i;
    w.block = &b;
    w.launch = &l;
    w.st = l.stats;
    if (l.raceOn) {
      w.vc.assign(nclk, l.epochBase);
      w.proxy.assign(nclk, l.epochBase);
      w.vc[w.clockId]++;
      if (config().raceWarp) w.lanes.reset(new LaneRace);
    }
  }
  if (config().seed) std::shuffle(b.order.begin(), b.order.end(), l.rng);
}

std::unique_ptr<Cluster> makeCluster(Launch& l, uint64_t index) {
  std::unique_ptr<Cluster> c;
  if (!l.spare.empty()) {
    c = std::move(l.spare.back());
    l.spare.pop_back();
  } else
    c.reset(new Cluster);
  c->arrived = c->phase = 0;
  c->waiters.clear();
  c->vc.clear();
  c->proxy.clear();
  c->doneVc.clear();
  c->doneProxy.clear();
  c->done = false;
  c->warpClocks = (int)(l.clusterBlocks * l.warpsPerBlock);
  c->engineEpoch.assign(kAsyncEngines, l.epochBase);
  c->liveThreads = (int)(l.clusterBlocks * l.threads);
  c->blocks.resize(l.clusterBlocks);
  for (uint32_t r = 0; r < l.clusterBlocks; r++) {
    if (!c->blocks[r]) c->blocks[r].reset(new Block);
    setupBlock(l, *c, *c->blocks[r], index, (int)r);
  }
  return c;
}

void retire(Launch& l, size_t i) {
  std::unique_ptr<Cluster> c = std::move(l.resident[i]);
  l.resident.erase(l.resident.begin() + i);
  uint32_t top = l.epochBase;
  for (auto& b : c->blocks)
    for (auto& w : b->warps)
      if (!w->vc.empty()) top = std::max(top, w->vc[w->clockId]);
  for (uint32_t e : c->engineEpoch) top = std::max(top, e);
  if (l.resident.empty()) l.epochBase = top + 1;  // clusters that run together share the base
  l.spare.push_back(std::move(c));
}

void runGrid(Launch& l) {
  const LaunchConfig& g = l.cfg;
  GridWork& work = *l.work;
  uint64_t lastProgress = 0, lastOthers = 0, progressAt = 0;
  int stalled = 0;
  auto start = [&] {
    uint64_t i = work.next++;
    if (i < work.total) l.resident.push_back(makeCluster(l, i));
    return i < work.total;
  };
  if (g.cooperative)
    while (start()) {
    }
  while (!work.stop) {
    if (l.resident.empty() && !start()) return;
    bool ran = false, allPolled = true;
    for (size_t ci = 0; ci < l.resident.size(); ci++) {
      Cluster& c = *l.resident[ci];
      for (auto& b : c.blocks) {
        if (b->done) continue;
        for (int wi : b->order) {
          Warp& w = *b->warps[wi];
          if (!w.live) continue;
          tlWarp = &w;
          SliceEnd e = runWarp(w, config().seed ? 1 + (int)(l.rng() % config().slice) : config().slice);
          if (e == SliceEnd::Blocked) {
            if (w.hasCurrent) ran = true;
            continue;
          }
          ran = true;
          if (e != SliceEnd::Polled) allPolled = false;
        }
        if (b->liveWarps == 0) {
          tlWarp = b->warps[0].get();
          finishAsync(*b);
          b->done = true;
          ran = true;
          allPolled = false;
        }
      }
    }
    for (size_t ci = l.resident.size(); ci-- > 0;) {
      bool done = true;
      for (auto& b : l.resident[ci]->blocks) done &= b->done;
      if (done) retire(l, ci);
    }
    if (l.parallel) work.progress += l.progress - lastProgress;
    const uint64_t others = work.progress;
    if (l.progress != lastProgress || others != lastOthers) {
      lastProgress = l.progress;
      lastOthers = others;
      progressAt = l.instructions;
      stalled = 0;
    } else if (!l.resident.empty()) {
      // Nothing happened that anyone could wait for.
      bool canStart = work.next < work.total && l.resident.size() < 132;
      if (!ran || (allPolled && ++stalled > kStallRounds)) {
        bool runnable = false;  // barriers may have been released late in the round
        for (auto& c : l.resident)
          for (auto& b : c->blocks)
            for (auto& w : b->warps) {
              if (w->hasCurrent && w->active && !w->polled) runnable = true;
              for (auto& x : w->others) runnable |= x.state == Group::Run && !w->polled;
            }
        if (!runnable) {
          if (canStart && stalled && start())
            stalled = 0;
          else
            deadlock(l, "deadlock");
        }
      }
      if (l.instructions - progressAt > kMoreBlocksAfter && canStart && start()) progressAt = l.instructions;
      if (l.instructions - progressAt > kSpinLimit) deadlock(l, "no progress (endless loop?)");
    }
    if (l.instructions > config().maxInstructions) deadlock(l, "instruction limit (CUDASIM_MAX_INSTRUCTIONS) reached");
  }
}

}  // namespace

bool converge(Warp& w, uint32_t need, bool warpBarrier) {
  if ((need & w.live & ~w.m) == 0) {
    laneSync(w, need & w.m);
    return true;
  }
  w.ev = Event::WaitSync;
  w.syncNeed = need;
  w.syncWarpBarrier = warpBarrier;
  return false;
}

void waitAtBarrier(Warp& w, uint32_t resumePc) {
  Group g;
  g.pc = resumePc;
  g.mask = w.m;
  g.state = Group::Bar;
  w.others.push_back(g);
  w.ev = Event::WaitBar;
}

static void wake(const BarrierWait& x) {
  for (auto& g : x.warp->others)
    if (g.state == Group::Bar && (g.mask & x.mask)) g.state = Group::Run;
}

void checkBarrier(Block& b, int id) {
  BlockBarrier& x = b.bars[id];
  uint32_t expected = x.expected ? x.expected : (uint32_t)b.liveThreads;
  if (x.arrived == 0 || x.arrived < expected) return;
  std::vector<BarrierWait> waiters = std::move(x.waiters);
  VClock vc = std::move(x.vc), proxy = std::move(x.proxy);
  uint32_t pop = x.redPop, any = x.redOr, all = x.redAnd;
  x = BlockBarrier();
  b.launch->progress++;
  for (auto& wt : waiters) {
    acquire(*wt.warp, vc, proxy);
    laneSync(*wt.warp, ~0u);
    if (wt.inst && wt.inst->sub2) {  // bar.red delivers its result
      Warp& w = *wt.warp;
      uint32_t save = w.m;
      w.m = wt.mask;
      if (wt.inst->sub2 == 1) {
        uint32_t* d = w.reg<uint32_t>(wt.inst->op[0]);
        CUDASIM_LANES(pop);
      } else
        w.setPred(wt.inst->op[0], (wt.inst->sub2 == 2 ? all : any) ? ~0u : 0);
      w.m = save;
    }
    wake(wt);
  }
}

void checkClusterBarrier(Cluster& c) {
  if (c.arrived == 0 || (int)c.arrived < c.liveThreads) return;
  c.arrived = 0;
  c.phase++;
  c.doneVc = c.vc;
  c.doneProxy = c.proxy;
  c.blocks[0]->launch->progress++;
  std::vector<BarrierWait> waiters = std::move(c.waiters);
  c.waiters.clear();
  for (auto& x : waiters) wake(x);
}

// Cooperative groups keep their grid barrier here; %envreg1 and 2 hold the address.
uint8_t* gridWorkspace() {
  static uint8_t* p = [] {
    void* q = deviceAlloc(64);
    return (uint8_t*)q;
  }();
  return p;
}

bool Launch::asyncEarly() {
  return config().seed && (rng() & 3) == 0;
}

// Runs clusters until none is left; the first fault of any worker is kept.
static void runWorker(Launch& l) {
  sigjmp_buf jump;
  sigjmp_buf* outer = tlJump;
  struct Restore {
    sigjmp_buf* o;
    ~Restore() {
      tlJump = o;
      tlWarp = nullptr;
    }
  } restore{outer};
  try {
    if (sigsetjmp(jump, 1)) {
      tlJump = nullptr;
      AtomicLock::abandon();
      throw Fault(kFaultIllegalAddress,
                  format("access to unmapped memory at 0x%llx: %s", (unsigned long long)tlBadAddress,
                         describeAddress(tlBadAddress).c_str()));
    }
    tlJump = &jump;
    runGrid(l);
  } catch (Fault& f) {
    tlJump = nullptr;
    Fault n(f.code,
            f.located || !tlWarp ? std::string(f.what()) : std::string(f.what()) + "\n    at " + where(*tlWarp, f.lane),
            f.lane);
    n.located = true;
    l.work->stop = true;
    std::lock_guard<std::mutex> g(l.work->mutex);
    if (!l.work->fault) l.work->fault.reset(new Fault(n));
  }
}

void runLaunch(Kernel& k, const LaunchConfig& cfg, const void* params) {
  static std::mutex one;  // the parameter buffer and the reports belong to one launch at a time
  std::lock_guard<std::mutex> g(one);
  static uint64_t launches = 0;
  installSegvHandler();
  const uint64_t id = ++launches;
  GridWork work;
  work.total = 1;
  for (int i = 0; i < 3; i++) work.total *= cfg.grid[i] / cfg.cluster[i];
  const int workers = cfg.cooperative ? 1 : (int)std::min<uint64_t>(std::max(1, config().threads), work.total);
  std::vector<Stats> stats(workers);
  std::vector<std::unique_ptr<Launch>> views;
  for (int i = 0; i < workers; i++) {
    views.emplace_back(new Launch);
    Launch& l = *views.back();
    l.work = &work;
    l.parallel = workers > 1;
    l.kernel = &k;
    l.cfg = cfg;
    l.id = id;
    l.stats = &stats[i];
    l.rng.seed(config().seed * 0x9e3779b97f4a7c15ull + l.id + ((uint64_t)i << 32));
    l.threads = cfg.block[0] * cfg.block[1] * cfg.block[2];
    l.warpsPerBlock = (l.threads + 31) / 32;
    l.clusterBlocks = cfg.cluster[0] * cfg.cluster[1] * cfg.cluster[2];
    l.raceOn = config().race && l.clusterBlocks * l.warpsPerBlock <= 64;
  }
  Stats& st = stats[0];
  st.kernel = k.pretty;
  for (int i = 0; i < 3; i++) {
    st.grid[i] = cfg.grid[i];
    st.block[i] = cfg.block[i];
    st.cluster[i] = cfg.cluster[i];
  }
  st.dynamicShared = cfg.dynamicShared;
  st.staticShared = k.staticShared - kSharedBase;
  memset(gridWorkspace(), 0, 64);
  if (params) memcpy(k.paramData, params, k.paramBytes);
  clearRaceReports();
  auto t0 = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 1; i < workers; i++) threads.emplace_back([&, i] { runWorker(*views[i]); });
  runWorker(*views[0]);
  for (auto& t : threads) t.join();
  if (work.fault) throw *work.fault;
  for (int i = 1; i < workers; i++) st.merge(stats[i]);
  st.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  recordStats(st);
}

}  // namespace cudasim
