#include "slot_allocator.h"

#include <algorithm>
#include <map>
#include <queue>

namespace cudasim {

namespace {
constexpr uint32_t kNone = ~0u;
using Bits = std::vector<uint64_t>;
template <class F>
void eachOperand(Inst& in, F f) {
  for (int i = 0; i < in.nops; i++) f(in.op[i]);
  for (int i = 0; i < in.next; i++) f(const_cast<Operand&>(in.ext[i]));
}
}  // namespace

uint32_t SlotAllocator::newSlot(int width) {
  uint32_t bytes = width == 0 ? 4 : 32 * width;
  if (width) top_ = (top_ + 63) & ~63u;
  uint32_t s = top_;
  top_ += bytes;
  return s;
}

void SlotAllocator::extend(int reg, uint32_t at) {
  if (first_[reg] == kNone || at < first_[reg]) first_[reg] = at;
  if (last_[reg] == kNone || at > last_[reg]) last_[reg] = at;
}

void SlotAllocator::segment(uint32_t begin, uint32_t end) {
  if (begin == end) return;
  // Basic blocks.
  std::vector<bool> leader(end - begin + 1, false);
  leader[0] = true;
  auto inside = [&](int64_t pc) { return pc >= begin && pc < end; };
  auto targets = [&](const Inst& in, auto f) {
    if (in.table) {
      for (uint32_t t : *(const std::vector<uint32_t>*)in.aux) f(t);
    } else if (in.ends && inside(in.target)) {
      f((uint32_t)in.target);
    }
  };
  for (uint32_t pc = begin; pc < end; pc++) {
    Inst& in = k_.code[pc];
    bool jumps = in.ends;
    targets(in, [&](uint32_t t) { leader[t - begin] = true; });
    if (jumps) leader[pc + 1 - begin] = true;
  }
  std::vector<uint32_t> starts;
  std::vector<int> blockOf(end - begin);
  for (uint32_t pc = begin; pc < end; pc++) {
    if (leader[pc - begin]) starts.push_back(pc);
    blockOf[pc - begin] = (int)starts.size() - 1;
  }
  int nb = (int)starts.size();
  // Registers of this segment get dense numbers.
  std::map<int, int> dense;
  std::vector<int> regs;
  auto num = [&](int r) {
    auto it = dense.find(r);
    if (it != dense.end()) return it->second;
    int n = (int)regs.size();
    dense[r] = n;
    regs.push_back(r);
    return n;
  };
  for (uint32_t pc = begin; pc < end; pc++) {
    Inst& in = k_.code[pc];
    if (in.guard != kNoGuard) num((int)in.guard);
    eachOperand(in, [&](Operand& o) {
      if (o.reg >= 0 && !pinned_[o.reg]) num(o.reg);
    });
  }
  size_t words = (regs.size() + 63) / 64;
  std::vector<Bits> use(nb, Bits(words)), def(nb, Bits(words)), in(nb, Bits(words)), out(nb, Bits(words));
  auto test = [](const Bits& b, int i) { return b[i >> 6] >> (i & 63) & 1; };
  auto set = [](Bits& b, int i) { b[i >> 6] |= 1ull << (i & 63); };
  for (uint32_t pc = begin; pc < end; pc++) {
    Inst& x = k_.code[pc];
    int b = blockOf[pc - begin];
    bool guarded = x.guard != kNoGuard;
    if (guarded && !test(def[b], dense[x.guard])) set(use[b], dense[x.guard]);
    eachOperand(x, [&](Operand& o) {
      if (o.reg < 0 || pinned_[o.reg]) return;
      int n = dense[o.reg];
      if ((!o.def || guarded) && !test(def[b], n)) set(use[b], n);
    });
    if (!guarded)
      eachOperand(x, [&](Operand& o) {
        if (o.reg >= 0 && !pinned_[o.reg] && o.def) set(def[b], dense[o.reg]);
      });
  }
  std::vector<std::vector<int>> succ(nb);
  for (int b = 0; b < nb; b++) {
    uint32_t lastPc = (b + 1 < nb ? starts[b + 1] : end) - 1;
    Inst& x = k_.code[lastPc];
    targets(x, [&](uint32_t t) { succ[b].push_back(blockOf[t - begin]); });
    if ((!x.ends || x.guard != kNoGuard) && lastPc + 1 < end) succ[b].push_back(blockOf[lastPc + 1 - begin]);
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (int b = nb; b-- > 0;) {
      for (size_t i = 0; i < words; i++) {
        uint64_t o = 0;
        for (int s : succ[b]) o |= in[s][i];
        out[b][i] = o;
        uint64_t n = use[b][i] | (o & ~def[b][i]);
        if (n != in[b][i]) {
          in[b][i] = n;
          changed = true;
        }
      }
    }
  }
  for (int b = 0; b < nb; b++) {
    uint32_t s = starts[b], e = (b + 1 < nb ? starts[b + 1] : end) - 1;
    for (size_t i = 0; i < regs.size(); i++) {
      if (test(in[b], (int)i)) extend(regs[i], s);
      if (test(out[b], (int)i)) extend(regs[i], e);
    }
  }
  for (uint32_t pc = begin; pc < end; pc++) {
    Inst& x = k_.code[pc];
    if (x.guard != kNoGuard) extend((int)x.guard, pc);
    eachOperand(x, [&](Operand& o) {
      if (o.reg >= 0 && !pinned_[o.reg]) extend(o.reg, pc);
    });
  }
  // Linear scan. Source and destination of one instruction never share a slot,
  // because handlers of cross-lane operations write while still reading.
  std::sort(regs.begin(), regs.end(), [&](int a, int b) { return first_[a] < first_[b]; });
  using Active = std::pair<uint32_t, int>;
  std::priority_queue<Active, std::vector<Active>, std::greater<Active>> active;
  std::map<int, std::vector<uint32_t>> free;
  for (int r : regs) {
    if (pinned_[r]) continue;  // pinned guards
    while (!active.empty() && active.top().first < first_[r]) {
      int dead = active.top().second;
      free[width_[dead]].push_back(slot_[dead]);
      active.pop();
    }
    auto& f = free[width_[r]];
    if (f.empty())
      slot_[r] = newSlot(width_[r]);
    else {
      slot_[r] = f.back();
      f.pop_back();
    }
    active.push({last_[r], r});
  }
}

void SlotAllocator::run() {
  size_t n = width_.size();
  first_.assign(n, kNone);
  last_.assign(n, kNone);
  slot_.assign(n, kNone);
  for (size_t r = 0; r < n; r++)
    if (pinned_[r]) slot_[r] = newSlot(width_[r]);
  for (size_t i = 0; i < fnBegin_.size(); i++)
    segment(fnBegin_[i], i + 1 < fnBegin_.size() ? fnBegin_[i + 1] : (uint32_t)k_.code.size());
  for (Inst& in : k_.code) {
    if (in.guard != kNoGuard) in.guard = slot_[in.guard];
    eachOperand(in, [&](Operand& o) {
      if (o.reg >= 0) o.off = slot_[o.reg];
    });
  }
  k_.regBytes = (top_ + 63) & ~63u;
}

}  // namespace cudasim
