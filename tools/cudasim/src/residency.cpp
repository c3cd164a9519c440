// Clusters become resident with fresh registers and memory, and retire.
#include <algorithm>

#include "scheduler.h"

namespace cudasim {

namespace {

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

}  // namespace

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

}  // namespace cudasim
