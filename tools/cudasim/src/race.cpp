#include "race.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <tuple>

#include "machine.h"
#include "module.h"

namespace cudasim {

void joinClock(VClock& into, const VClock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); i++) into[i] = into[i] > from[i] ? into[i] : from[i];
}

void RaceShadow::prepare(uint32_t sharedBytes, int nclocks) {
  size_t words = (sharedBytes + 3) / 4;
  if (clocks != nclocks || writes.size() < words) {
    clocks = nclocks;
    writes.assign(words, Write());
    readEpoch.assign(words * nclocks, 0);
    readLine.assign(words * nclocks, 0);
    readMask.assign(words * nclocks, 0);
  }
  if (config().uninit) written.assign(words, 0);
}

RaceActor actorOf(Warp& w, int line) {
  return {w.clockId, w.vc[w.clockId], &w.vc, nullptr, line};
}

namespace {
std::atomic<uint64_t> g_races{0};
std::mutex g_mutex;  // of g_reported and g_last
std::set<std::tuple<int, int, int>> g_reported;
std::string g_last;
constexpr int kPrintedReports = 20;  // of a launch
int g_printed = 0;
bool firstReport(int line1, int line2, int code) {
  std::lock_guard<std::mutex> g(g_mutex);
  return g_reported.insert({line1, line2, code}).second;
}
void print(const std::string& msg) {
  std::lock_guard<std::mutex> g(g_mutex);
  g_last = msg;
  if (++g_printed <= kPrintedReports)
    fprintf(stderr, "cudasim: %s", msg.c_str());
  else if (g_printed == kPrintedReports + 1)
    fprintf(stderr, "cudasim: further reports of this launch are counted, not printed\n");
}
}  // namespace

void reportRace(Block& b, const char* kind, const std::string& place, int who1, int line1, int who2, int line2,
                int code) {
  if (!firstReport(line1, line2, code)) return;
  g_races++;
  Launch& l = *b.launch;
  l.stats->races++;
  auto& text = *l.kernel->module->ptx;
  auto actor = [&](int who) {
    if (who < 0) return std::string("nobody");
    if (who >= b.cluster->warpClocks) return std::string("an asynchronous copy");
    int per = (int)l.warpsPerBlock;
    std::string s = format("warp %d", who % per);
    if (b.cluster->blocks.size() > 1) s += format(" of cluster block %d", who / per);
    return s;
  };
  std::string msg =
      format("%s in kernel %s, block (%u,%u,%u), %s\n    %s, PTX line %d: %s\n", kind, l.kernel->title.c_str(),
             b.idx[0], b.idx[1], b.idx[2], place.c_str(), actor(who1).c_str(), line1, text.lineText(line1).c_str());
  if (who2 >= 0) msg += format("    %s, PTX line %d: %s\n", actor(who2).c_str(), line2, text.lineText(line2).c_str());
  print(msg);
  if (config().race == 2) throw Fault(kFaultTrap, kind);
}
std::string sharedPlace(uint32_t off) {
  return format("shared memory offset %u", off);
}

namespace {
inline uint8_t byteMask(uint32_t word, uint32_t off, uint32_t end) {
  uint32_t b = word * 4, m = 15;
  if (off > b) m &= 15u << (off - b);
  if (end < b + 4) m &= 15u >> (b + 4 - end);
  return (uint8_t)m;
}
}  // namespace

void raceRead(Block& b, uint32_t off, uint32_t bytes, const RaceActor& a) {
  RaceShadow& s = b.race;
  off -= kSharedBase;
  const uint32_t end = off + bytes;
  for (uint32_t w = off / 4; w * 4 < end; w++) {
    const uint8_t m = byteMask(w, off, end);
    const RaceShadow::Write& wr = s.writes[w];
    if (wr.mask & m) {
      if (wr.who != a.who && (*a.seen)[wr.who] < wr.epoch)
        reportRace(b, "read/write race", sharedPlace(w * 4), wr.who, wr.line, a.who, a.line, 0);
      else if (a.proxySeen && !wr.async && wr.epoch > b.launch->epochBase && (*a.proxySeen)[wr.who] < wr.epoch)
        reportRace(b, "missing fence.proxy.async between a generic write and an async-proxy read", sharedPlace(w * 4),
                   wr.who, wr.line, a.who, a.line, 1);
    }
    size_t r = (size_t)w * s.clocks + a.who;
    if (s.readEpoch[r] == a.epoch)
      s.readMask[r] |= m;
    else {
      s.readEpoch[r] = a.epoch;
      s.readMask[r] = m;
    }
    s.readLine[r] = a.line;
    if (!s.written.empty() && (s.written[w] & m) != m) {
      b.launch->stats->uninitReads++;
      reportRace(b, "read of shared memory that was never written", sharedPlace(w * 4), a.who, a.line, -1, 0, 2);
    }
  }
}

void raceWrite(Block& b, uint32_t off, uint32_t bytes, const RaceActor& a, const uint8_t* newData) {
  RaceShadow& s = b.race;
  // Writing what is already there changes nothing another warp could see.
  const bool same = newData && memcmp(b.sharedPtr(off), newData, bytes) == 0;
  off -= kSharedBase;
  const uint32_t end = off + bytes;
  for (uint32_t w = off / 4; w * 4 < end; w++) {
    const uint8_t m = byteMask(w, off, end);
    if (!s.written.empty()) s.written[w] |= m;
    if (same) continue;
    RaceShadow::Write& wr = s.writes[w];
    if ((wr.mask & m) && wr.who != a.who && (*a.seen)[wr.who] < wr.epoch)
      reportRace(b, "write/write race", sharedPlace(w * 4), wr.who, wr.line, a.who, a.line, 3);
    const uint32_t* re = &s.readEpoch[(size_t)w * s.clocks];
    const uint32_t* seen = a.seen->data();
    bool any = false;
    for (int r = 0; r < s.clocks; r++) any |= re[r] > seen[r];
    if (any)
      for (int r = 0; r < s.clocks; r++)
        if (re[r] > seen[r] && r != a.who && (s.readMask[(size_t)w * s.clocks + r] & m))
          reportRace(b, "write/read race", sharedPlace(w * 4), r, s.readLine[(size_t)w * s.clocks + r], a.who, a.line,
                     4);
    if (wr.who == a.who && wr.epoch == a.epoch && wr.async == (a.proxySeen != nullptr))
      wr.mask |= m;
    else
      wr.mask = m;
    wr.who = (uint16_t)a.who;
    wr.epoch = a.epoch;
    wr.line = a.line;
    wr.async = a.proxySeen != nullptr;
  }
}

void raceGlobal(Block& b, uint64_t addr, uint32_t bytes, const RaceActor& a, bool write, const uint8_t* newData) {
  if (write && newData && memcmp((const void*)addr, newData, bytes) == 0) return;
  const uint64_t end = addr + bytes;
  for (uint64_t w = addr / 4; w * 4 < end; w++) {
    const uint8_t m =
        byteMask(0, addr > w * 4 ? (uint32_t)(addr - w * 4) : 0, end < w * 4 + 4 ? (uint32_t)(end - w * 4) : 4);
    GlobalWord& g = b.globalRace[w];
    auto place = [&] { return format("global memory 0x%llx", (unsigned long long)w * 4); };
    if ((g.write.mask & m) && g.write.who != a.who && (*a.seen)[g.write.who] < g.write.epoch)
      reportRace(b, write ? "write/write race" : "read/write race", place(), g.write.who, g.write.line, a.who, a.line,
                 6);
    if (g.reads.empty()) g.reads.resize(b.cluster->warpClocks);
    if (!write) {
      g.reads[a.who] = {a.epoch, a.line};
      continue;
    }
    for (int r = 0; r < (int)g.reads.size(); r++)
      if (r != a.who && g.reads[r].first > (*a.seen)[r])
        reportRace(b, "write/read race", place(), r, g.reads[r].second, a.who, a.line, 7);
    g.write.who = (uint16_t)a.who;
    g.write.epoch = a.epoch;
    g.write.line = a.line;
    g.write.mask = m;
  }
}

static std::string twoLines(Warp& w, const std::string& what, int line1, int line2) {
  auto& text = *w.launch->kernel->module->ptx;
  std::string s = format("%s in kernel %s\n    PTX line %d: %s\n", what.c_str(), w.launch->kernel->title.c_str(), line1,
                         text.lineText(line1).c_str());
  if (line2) s += format("    PTX line %d: %s\n", line2, text.lineText(line2).c_str());
  return s;
}

void noteOnce(Warp& w, const std::string& what, int line1, int line2) {
  if (!config().race || !firstReport(line1, line2, 8)) return;
  fprintf(stderr, "cudasim: note: %s", twoLines(w, what, line1, line2).c_str());
}

void noteHazard(Warp& w, const std::string& what, int line1, int line2) {
  if (!config().race || !firstReport(line1, line2, 5)) return;
  g_races++;
  w.st->races++;
  print(twoLines(w, what, line1, line2));
  if (config().race == 2) throw Fault(kFaultTrap, what);
}

void release(Warp& w, VClock& into, VClock& proxyInto) {
  if (!w.launch->raceOn) return;
  joinClock(into, w.vc);
  joinClock(proxyInto, w.proxy);
  w.vc[w.clockId]++;
}
void acquire(Warp& w, const VClock& from, const VClock& proxyFrom) {
  if (!w.launch->raceOn) return;
  joinClock(w.vc, from);
  joinClock(w.proxy, proxyFrom);
}
void proxyFence(Warp& w) {
  if (!w.launch->raceOn) return;
  joinClock(w.proxy, w.vc);
  w.vc[w.clockId]++;  // later writes are not covered
}

uint64_t raceCount() {
  return g_races;
}
std::string lastReport() {
  std::lock_guard<std::mutex> g(g_mutex);
  return g_last;
}
void resetRaces() {
  std::lock_guard<std::mutex> g(g_mutex);
  g_races = 0;
  g_last.clear();
}
void clearRaceReports() {
  g_reported.clear();
  g_printed = 0;
}

}  // namespace cudasim
