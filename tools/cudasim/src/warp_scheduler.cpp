// Which lanes of a warp run.
//
// Divergence: the lanes of a warp form groups with one pc each, and the
// runnable group with the lowest pc goes first, so that groups meet again at
// the earliest common instruction. Callees are linked below their callers,
// which makes calls return before the caller goes on. A group that spins does
// not starve the others: after some slices another group gets a turn.
#include "scheduler.h"

namespace cudasim {

namespace {

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

}  // namespace

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

}  // namespace cudasim
