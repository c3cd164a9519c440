// Barriers of a block and of a cluster release their waiters when the last thread arrives or ends.
#include "lanes.h"
#include "machine.h"

namespace cudasim {

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

}  // namespace cudasim
