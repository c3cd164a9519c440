// Per-launch statistics.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "ir.h"

namespace cudasim {

// Bytes touched at least once, as bitmaps of 4 KiB pages.
class Footprint {
 public:
  void touch(uint64_t addr, uint32_t bytes);
  uint64_t count() const;
  void merge(const Footprint& o);

 private:
  struct Page {
    uint64_t bits[64];
  };
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t lastKey_ = ~0ull;
  Page* last_ = nullptr;
};

struct Stats {
  std::string kernel;
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamicShared = 0, staticShared = 0;
  uint64_t cls[(int)Cls::Count] = {};
  uint64_t warpInsts = 0, threadInsts = 0;
  uint64_t mmaFlops = 0;
  uint64_t globalLoadRequests = 0, globalStoreRequests = 0;
  uint64_t globalLoadSectors = 0, globalStoreSectors = 0;
  uint64_t atomics = 0;
  uint64_t sharedRequests = 0, sharedWavefronts = 0, sharedExcess = 0;
  uint64_t cpAsyncBytes = 0, bulkBytes = 0;
  uint64_t barriers = 0;
  uint64_t races = 0, uninitReads = 0;
  double seconds = 0;
  Footprint readSet, writeSet;
  void merge(const Stats& o);  // adds the counts of another worker
  std::string json() const;
};

void recordStats(const Stats& s);
std::string allStatsJson();
void resetStats();

// 32-byte sectors touched by the lanes of one access.
uint32_t countSectors(const uint64_t* addr, uint32_t mask, uint32_t bytes);
// Wavefronts of a shared access and the number a conflict-free one would take.
void bankWavefronts(const uint32_t* off, uint32_t mask, uint32_t bytes, uint32_t& waves, uint32_t& ideal);

}  // namespace cudasim
