#include "lane_race.h"

#include <cstring>

#include "lanes.h"
#include "machine.h"

namespace cudasim {

LaneRace::LaneRace() {
  memset(clock, 0, sizeof clock);
  for (int i = 0; i < 32; i++) clock[i][i] = 1;
}

void laneSync(Warp& w, uint32_t lanes) {
  if (!w.lanes) return;
  LaneRace& r = *w.lanes;
  if ((w.live & ~lanes) == 0) r.words.clear();
  uint32_t top[32] = {};
  eachLane(lanes, [&](int l) {
    for (int k = 0; k < 32; k++) top[k] = top[k] > r.clock[l][k] ? top[k] : r.clock[l][k];
  });
  eachLane(lanes, [&](int l) {
    memcpy(r.clock[l], top, sizeof top);
    r.clock[l][l]++;
  });
}

static void report(Warp& w, const char* kind, uint32_t word, int lane1, int line1, int lane2, int line2) {
  reportRace(*w.block,
             format("%s between lanes %d and %d of a warp without a .sync instruction", kind, lane1, lane2).c_str(),
             sharedPlace(word * 4), w.clockId, line1, w.clockId, line2, 10);
}

void laneAccess(Warp& w, int lane, uint32_t off, uint32_t bytes, int line, bool write) {
  LaneRace& r = *w.lanes;
  const uint32_t* seen = r.clock[lane];
  off -= kSharedBase;
  for (uint32_t i = off / 4; i * 4 < off + bytes; i++) {
    uint8_t m = 15;
    if (off > i * 4) m &= 15u << (off - i * 4);
    if (off + bytes < i * 4 + 4) m &= 15u >> (i * 4 + 4 - off - bytes);
    LaneRace::Word& x = r.words[i];
    if (x.written > seen[x.writer] && x.writer != lane && (x.mask & m) && x.line != line)
      report(w, write ? "write/write race" : "write/read race", i, x.writer, x.line, lane, line);
    if (!write) {
      x.readMask[lane] = x.read[lane] == seen[lane] ? x.readMask[lane] | m : m;
      x.read[lane] = seen[lane];
      x.readLine[lane] = line;
      continue;
    }
    for (int k = 0; k < 32; k++)
      if (x.read[k] > seen[k] && k != lane && (x.readMask[k] & m) && x.readLine[k] != line)
        report(w, "read/write race", i, k, x.readLine[k], lane, line);
    x.mask = x.writer == lane && x.written == seen[lane] ? x.mask | m : m;
    x.written = seen[lane];
    x.writer = (uint8_t)lane;
    x.line = line;
  }
}

}  // namespace cudasim
