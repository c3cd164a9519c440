// Races between the lanes of one warp (CUDASIM_RACE_WARP). The emulator runs
// lanes in lockstep, hardware need not: an exchange through shared memory wants
// bar.warp.sync or another collective in between.
#pragma once
#include <cstdint>
#include <unordered_map>

namespace cudasim {

struct Warp;

struct LaneRace {
  struct Word {
    uint32_t written = 0;  // time of the last write, on the writer's clock
    int32_t line = 0;
    uint8_t writer = 0, mask = 0;
    uint32_t read[32] = {};
    int32_t readLine[32] = {};
    uint8_t readMask[32] = {};
  };
  uint32_t clock[32][32];                    // [lane][other]: how far the lane is ordered after the other one
  std::unordered_map<uint32_t, Word> words;  // what was touched since the whole warp synchronised
  LaneRace();
};

// `lanes` meet; ~0 for the whole warp. Nothing happens unless the check is on.
void laneSync(Warp& w, uint32_t lanes);
// An access to shared memory of the own block; new data equal to the old is no write.
void laneAccess(Warp& w, int lane, uint32_t off, uint32_t bytes, int line, bool write);

}  // namespace cudasim
