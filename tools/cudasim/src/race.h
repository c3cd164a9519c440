// Shared-memory race detector: one vector clock per warp, and per 4-byte word
// the last write and the last read of every warp. Barriers, mbarriers and the
// waits of asynchronous copies join clocks.
//
// A second clock, `proxy`, holds what fence.proxy.async has made visible to the
// async proxy (PTX ISA, "Proxies"); wgmma and bulk copies that read a word need
// its last generic write to be covered by it.
#pragma once
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace cudasim {

using VClock = std::vector<uint32_t>;
void joinClock(VClock& into, const VClock& from);

struct Warp;
struct Block;

// Copies under way to a word of shared memory (see pending_copy.cpp).
struct PendingCopy {
  uint64_t src = 0;  // what the word will hold: an address, 0 for a fill
  int32_t line = 0;
  uint16_t count = 0;
  uint16_t who = 0;  // the warp that issued the last one
};

struct RaceShadow {
  struct Write {
    uint32_t epoch = 0;
    uint16_t who = 0;
    uint8_t mask = 0;   // bytes of the word
    uint8_t async = 0;  // written through the async proxy
    int32_t line = 0;
  };
  int clocks = 0;  // readers tracked per word
  std::vector<Write> writes;
  std::vector<uint32_t> readEpoch;   // [word * clocks + reader]
  std::vector<int32_t> readLine;     // likewise
  std::vector<uint8_t> readMask;     // bytes, likewise
  std::vector<uint8_t> written;      // per word: byte mask ever written
  std::vector<PendingCopy> pending;  // per word, allocated by the first copy
  uint64_t pendingWords = 0;         // words with a copy under way
  // Epochs only grow over the blocks of a launch, so that old records need no clearing.
  void prepare(uint32_t sharedBytes, int nclocks);
};

// `seen` is the clock the access is ordered after, `epoch` the time at which it
// may still happen (they differ for asynchronous operations).
struct RaceActor {
  int who;
  uint32_t epoch;
  const VClock* seen;
  const VClock* proxySeen;  // null for the generic proxy
  int line;
};
RaceActor actorOf(Warp& w, int line);

void raceWrite(Block& b, uint32_t off, uint32_t bytes, const RaceActor& a, const uint8_t* newData);
void raceRead(Block& b, uint32_t off, uint32_t bytes, const RaceActor& a);
// Shared memory that an asynchronous copy of warp `who` is about to write, until it lands.
void markPending(Block& b, uint32_t off, uint32_t bytes, int who, int line, uint64_t src, uint32_t srcBytes);
void unmarkPending(Block& b, uint32_t off, uint32_t bytes, int who);
// Reports an access to memory that a copy of the same warp is about to write. `src`: source of an access that is a copy
// itself.
void checkPending(Warp& w, Block& b, uint32_t off, uint32_t bytes, int line, bool write, uint64_t src = ~0ull,
                  uint32_t srcBytes = 0);
// The same for global memory, between the warps of one block (CUDASIM_RACE_GLOBAL).
void raceGlobal(Block& b, uint64_t addr, uint32_t bytes, const RaceActor& a, bool write, const uint8_t* newData);
// Release: what the warp did so far becomes part of `into`; starts a new epoch.
void release(Warp& w, VClock& into, VClock& proxyInto);
void acquire(Warp& w, const VClock& from, const VClock& proxyFrom);
void proxyFence(Warp& w);

// Prints a report once per pair of lines and counts it; may fail the launch. who < 0: no such party.
void reportRace(Block& b, const char* kind, const std::string& place, int who1, int line1, int who2, int line2,
                int code);
std::string sharedPlace(uint32_t off);

// Reports, once per pair of lines, something that is not a memory race; counts as a race. line2 may be 0.
void noteHazard(Warp& w, const std::string& what, int line1, int line2);

// Prints a remark once per pair of lines without counting it.
void noteOnce(Warp& w, const std::string& what, int line1, int line2);

uint64_t raceCount();
std::string lastReport();
void resetRaces();
void clearRaceReports();  // forget which pairs this launch has reported

}  // namespace cudasim
