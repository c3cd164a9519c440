#include "memory.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

#include "lanes.h"
#include "machine.h"

namespace cudasim {

namespace {
struct Ranges {
  std::mutex mutex;
  std::map<uint64_t, RangeInfo> byBase;
  std::map<uint64_t, bool> owned;  // made by deviceAlloc
  std::atomic<uint64_t> version{1};
  std::atomic<int> userCount{0};
  std::atomic<bool> programAllocates{false};
  uint64_t bytes = 0;
};
Ranges& ranges() {
  static Ranges* r = new Ranges;
  return *r;
}
// The allocations used last, so that the usual access takes no lock.
struct CachedRange {
  uint64_t base = 1, end = 0;
};
constexpr int kCachedRanges = 8;
struct RangeCache {
  CachedRange r[kCachedRanges];
  uint64_t version = 0;
  int next = 0;
  bool covers(uint64_t lo, uint64_t hi) {
    uint64_t v = ranges().version.load(std::memory_order_relaxed);
    if (version != v) {
      *this = RangeCache();
      version = v;
      return false;
    }
    for (auto& c : r)
      if (lo >= c.base && hi <= c.end) return true;
    return false;
  }
  void add(uint64_t base, uint64_t end) { r[next++ % kCachedRanges] = {base, end}; }
};
thread_local RangeCache tlCache;
}  // namespace

void* deviceAlloc(size_t bytes) {
  void* p = nullptr;
  size_t n = (bytes + 511) / 512 * 512;
  if (n == 0) n = 512;
  if (posix_memalign(&p, 512, n)) return nullptr;
  memset(p, 0xff, n);  // NaN poison
  registerRange(p, bytes ? bytes : 1, "cudaMalloc", false);
  auto& r = ranges();
  std::lock_guard<std::mutex> g(r.mutex);
  r.owned[(uint64_t)p] = true;
  r.bytes += bytes;
  return p;
}
bool deviceFree(void* p) {
  auto& r = ranges();
  {
    std::lock_guard<std::mutex> g(r.mutex);
    auto it = r.owned.find((uint64_t)p);
    if (it == r.owned.end()) return false;
    r.owned.erase(it);
    r.bytes -= r.byBase[(uint64_t)p].size;
  }
  unregisterRange(p);
  free(p);
  return true;
}
void registerRange(const void* p, size_t bytes, const std::string& name, bool byUser) {
  auto& r = ranges();
  std::lock_guard<std::mutex> g(r.mutex);
  auto it = r.byBase.find((uint64_t)p);
  if (it != r.byBase.end() && it->second.user) r.userCount--;
  r.byBase[(uint64_t)p] = {(uint64_t)p, bytes, name, byUser};
  if (byUser) r.userCount++;
  r.version++;
}
void unregisterRange(const void* p) {
  auto& r = ranges();
  std::lock_guard<std::mutex> g(r.mutex);
  auto it = r.byBase.find((uint64_t)p);
  if (it == r.byBase.end()) return;
  if (it->second.user) r.userCount--;
  r.byBase.erase(it);
  r.version++;
}
void programAllocates() {
  ranges().programAllocates = true;
}
bool strictMode() {
  return config().strict >= 0 ? config().strict : ranges().programAllocates || ranges().userCount > 0;
}
uint64_t allocatedBytes() {
  return ranges().bytes;
}

bool findRange(uint64_t addr, RangeInfo& out) {
  auto& r = ranges();
  std::lock_guard<std::mutex> g(r.mutex);
  // Registered ranges may overlap; look back over the ones starting before addr.
  auto it = r.byBase.upper_bound(addr);
  for (int n = 0; it != r.byBase.begin() && n < 64; n++) {
    --it;
    if (addr < it->second.base + it->second.size) {
      out = it->second;
      return true;
    }
  }
  return false;
}
std::string describeAddress(uint64_t addr, uint64_t bytes) {
  auto& r = ranges();
  std::lock_guard<std::mutex> g(r.mutex);
  const RangeInfo* best = nullptr;
  uint64_t bestDist = ~0ull;
  for (auto& [b, x] : r.byBase) {
    uint64_t dist = addr < b ? b - addr : addr >= b + x.size ? addr - (b + x.size) : 0;
    if (dist < bestDist) {
      bestDist = dist;
      best = &x;
    }
  }
  if (!best) return "no allocation is known";
  auto hex = [](uint64_t v) { return (unsigned long long)v; };
  const uint64_t end = best->base + best->size;
  if (addr >= best->base && addr < end) {
    std::string s = format("%llu bytes into '%s' [0x%llx, %llu bytes]", hex(addr - best->base), best->name.c_str(),
                           hex(best->base), hex(best->size));
    if (addr + bytes > end) s += format(", and ends %llu bytes past its end", hex(addr + bytes - end));
    return s;
  }
  return format("nearest allocation '%s' [0x%llx, %llu bytes]: the address is %llu bytes %s", best->name.c_str(),
                hex(best->base), hex(best->size), hex(addr < best->base ? best->base - addr : addr - end),
                addr < best->base ? "before its start" : "past its end");
}

static const char* accessName(Access a) {
  return a == Access::Read ? "read" : a == Access::Write ? "write" : "atomic access";
}

void checkGlobal(uint64_t addr, uint64_t bytes, Access a, int lane, const char* what) {
  if (addr - 4096 >= (1ull << 47) - 4096)
    throw Fault(kFaultIllegalAddress,
                format("%s %s of %llu bytes at 0x%llx: %s", what, accessName(a), (unsigned long long)bytes,
                       (unsigned long long)addr, describeAddress(addr).c_str()),
                lane);
  if (!strictMode()) return;
  if (tlCache.covers(addr, addr + bytes)) return;
  RangeInfo r;
  if (findRange(addr, r) && addr + bytes <= r.base + r.size) {
    tlCache.add(r.base, r.base + r.size);
    return;
  }
  // Nobody asked for strictness: say how to use plain host memory.
  const char* hint = config().strict < 0 && !ranges().userCount
                         ? " (CUDASIM_STRICT=0 allows memory that cudaMalloc did not make)"
                         : "";
  throw Fault(kFaultIllegalAddress,
              format("%s %s of %llu bytes at 0x%llx is outside every allocation: %s%s", what, accessName(a),
                     (unsigned long long)bytes, (unsigned long long)addr, describeAddress(addr, bytes).c_str(), hint),
              lane);
}

Block* sharedTarget(Warp& w, uint64_t addr, uint32_t bytes, int lane, uint32_t& off) {
  Block* b = w.block;
  uint32_t a = (uint32_t)addr, rank = a >> kClusterShift;
  off = a & ((1u << kClusterShift) - 1);
  if (rank) {
    if (rank > b->cluster->blocks.size())
      throw Fault(
          kFaultIllegalAddress,
          format("shared address 0x%x names block %u of a cluster of %zu", a, rank - 1, b->cluster->blocks.size()),
          lane);
    b = b->cluster->blocks[rank - 1].get();
    if (b->done && b != w.block)
      throw Fault(kFaultIllegalAddress,
                  format("shared memory of cluster block %u accessed after that block ended", rank - 1), lane);
  }
  if (off < kSharedBase || off + bytes > b->sharedEnd)
    throw Fault(kFaultIllegalAddress,
                format("shared access of %u bytes at offset %lld; the block has %u bytes of shared memory", bytes,
                       (long long)(int32_t)off - kSharedBase, b->sharedEnd - kSharedBase),
                lane);
  return b;
}

[[noreturn]] static void misaligned(uint64_t addr, uint32_t bytes, int lane) {
  throw Fault(kFaultMisaligned,
              format("access of %u bytes at misaligned address 0x%llx", bytes, (unsigned long long)addr), lane);
}

uint8_t* resolveOne(Warp& w, Space space, uint64_t addr, uint32_t bytes, uint32_t align, Access a, int lane) {
  if (addr & (align - 1)) misaligned(addr, bytes, lane);
  if (space == Space::None) {
    uint64_t win = addr & kWindowMask;
    if (win == kSharedWindow)
      space = Space::Shared;
    else if (win == kLocalWindow) {
      space = Space::Local;
      addr &= ~kWindowMask;
    } else
      space = Space::Global;
  }
  switch (space) {
    case Space::Shared: {
      uint32_t off;
      Block* b = sharedTarget(w, addr & ~kWindowMask, bytes, lane, off);
      return b->sharedPtr(off);
    }
    case Space::Local:
    case Space::Param:
      if (addr < kLocalBase || addr + bytes > w.localBytes)
        throw Fault(kFaultIllegalAddress,
                    format("local access of %u bytes at offset %lld; the thread has %u bytes of local memory", bytes,
                           (long long)addr - kLocalBase, w.localBytes - kLocalBase),
                    lane);
      return w.local + (size_t)lane * w.localBytes + addr;
    default: checkGlobal(addr, bytes, a, lane, "global"); return (uint8_t*)addr;
  }
}

void resolve(Warp& w, const Inst& I, Space space, const uint64_t* addr, uint32_t bytes, Access a, Lanes& out,
             bool shadow) {
  const uint32_t m = w.m;
  uint64_t any = 0, all = ~0ull, lo = ~0ull, hi = 0;
  if (m == ~0u) {
    for (int i = 0; i < 32; i++) {
      any |= addr[i];
      all &= addr[i];
      lo = addr[i] < lo ? addr[i] : lo;
      hi = addr[i] > hi ? addr[i] : hi;
    }
  } else {
    eachLane(m, [&](int i) {
      any |= addr[i];
      all &= addr[i];
      lo = addr[i] < lo ? addr[i] : lo;
      hi = addr[i] > hi ? addr[i] : hi;
    });
  }
  if (any & (bytes - 1))
    eachLane(m, [&](int i) {
      if (addr[i] & (bytes - 1)) misaligned(addr[i], bytes, i);
    });
  out.sharedMask = 0;
  if (space == Space::None) {  // generic
    uint64_t win = any & kWindowMask;
    if (win == 0)
      space = Space::Global;
    else if (win == kSharedWindow && (all & kWindowMask) == kSharedWindow)
      space = Space::Shared;
    else if (win == kLocalWindow && (all & kWindowMask) == kLocalWindow)
      space = Space::Local;
    else {
      uint32_t sm = 0;
      eachLane(m, [&](int i) {
        out.p[i] = resolveOne(w, Space::None, addr[i], bytes, bytes, a, i);
        if ((addr[i] & kWindowMask) == kSharedWindow) sm |= 1u << i;
      });
      out.sharedMask = 0;  // mixed windows: not tracked
      return;
    }
  }
  Stats& st = *w.st;
  switch (space) {
    case Space::Global: {
      bool ok = lo >= 4096 && hi < (1ull << 47) - 64;
      if (ok && strictMode()) ok = tlCache.covers(lo, hi + bytes);
      if (!ok) eachLane(m, [&](int i) { checkGlobal(addr[i], bytes, a, i, "global"); });
      eachLane(m, [&](int i) { out.p[i] = (uint8_t*)addr[i]; });
      uint32_t sectors = countSectors(addr, m, bytes);
      if (a != Access::Write) {
        st.globalLoadSectors += a == Access::Read ? sectors : 0;
      }
      if (a == Access::Read) st.globalLoadRequests++;
      if (a == Access::Write) {
        st.globalStoreRequests++;
        st.globalStoreSectors += sectors;
      }
      // Consecutive lanes are one range, which is the usual case.
      bool dense = m == ~0u && hi - lo == 31ull * bytes && addr[0] == lo && addr[1] == lo + bytes;
      if (a != Access::Write) {
        if (dense)
          st.readSet.touch(lo, 32 * bytes);
        else
          eachLane(m, [&](int i) { st.readSet.touch(addr[i], bytes); });
      }
      if (a != Access::Read) {
        if (dense)
          st.writeSet.touch(lo, 32 * bytes);
        else
          eachLane(m, [&](int i) { st.writeSet.touch(addr[i], bytes); });
      }
      return;
    }
    case Space::Shared: {
      uint32_t off[32];
      out.sharedMask = m;
      Block* own = w.block;
      const uint32_t end = own->sharedEnd;
      Block* blocks[32];
      bool remote = false;
      eachLane(m, [&](int i) {
        uint32_t o = (uint32_t)addr[i];
        if (o >= kSharedBase && o + bytes <= end && (addr[i] & ~kWindowMask) == o) {
          off[i] = o;
          blocks[i] = own;
          out.p[i] = own->sharedPtr(o);
        } else {
          blocks[i] = sharedTarget(w, addr[i] & ~kWindowMask, bytes, i, off[i]);
          out.p[i] = blocks[i]->sharedPtr(off[i]);
          remote = true;
        }
      });
      uint32_t waves, ideal;
      bankWavefronts(off, m, bytes, waves, ideal);
      st.sharedRequests++;
      st.sharedWavefronts += waves;
      st.sharedExcess += waves - ideal;
      if (w.launch->raceOn && (remote || own->race.pendingWords))
        eachLane(m, [&](int i) { checkPending(w, *blocks[i], off[i], bytes, I.line, a != Access::Read); });
      if (shadow && w.launch->raceOn && a == Access::Read) {
        RaceActor act = actorOf(w, I.line);
        eachLane(m, [&](int i) { raceRead(remote ? *blocks[i] : *own, off[i], bytes, act); });
        if (w.lanes)
          eachLane(m, [&](int i) {
            if (blocks[i] == own) laneAccess(w, i, off[i], bytes, I.line, false);
          });
      }
      return;
    }
    case Space::Local:
    case Space::Param: {
      eachLane(m, [&](int i) {
        uint64_t o = addr[i] & ~kWindowMask;
        if (o < kLocalBase || o + bytes > w.localBytes) resolveOne(w, Space::Local, o, bytes, bytes, a, i);
        out.p[i] = w.local + (size_t)i * w.localBytes + o;
      });
      return;
    }
    default:  // constant bank: host memory as well
      eachLane(m, [&](int i) {
        checkGlobal(addr[i], bytes, a, i, "constant");
        out.p[i] = (uint8_t*)addr[i];
      });
  }
}

}  // namespace cudasim
