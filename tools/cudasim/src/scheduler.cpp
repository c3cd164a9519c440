// Runs the blocks of a launch.
//
// Warps take turns of some instructions each (warp_scheduler.cpp). Blocks run
// one cluster at a time; a further one becomes resident when the running ones
// only spin, since they may wait for it.
#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <csetjmp>
#include <csignal>
#include <mutex>
#include <thread>

#include "exec_memory.h"
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
