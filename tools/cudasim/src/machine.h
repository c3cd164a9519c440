// Run-time state of a launch: warps, blocks, clusters.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "ir.h"
#include "lane_race.h"
#include "race.h"
#include "stats.h"

namespace cudasim {

struct Block;
struct Launch;
struct Cluster;

// What an instruction asks of the warp scheduler besides falling through.
enum class Event : uint8_t {
  None,
  Diverge,   // lanes in `splitMask` go to `splitPc`, the rest to npc
  Exit,      // lanes in m ended
  WaitSync,  // a .sync collective waits for more lanes of this warp
  WaitBar,   // lanes in m wait at a block or cluster barrier
  Yield,     // end the time slice (failed try_wait, nanosleep)
};

// Lanes of a warp that share a program counter.
struct Group {
  uint32_t pc = 0, mask = 0;
  enum State : uint8_t { Run, Sync, Bar } state = Run;
  uint32_t need = 0;         // Sync: lanes the collective waits for
  bool warpBarrier = false;  // Sync at bar.warp.sync
};

struct CpAsync {                 // one warp-wide cp.async
  uint32_t mask = 0, bytes = 0;  // mask: lanes that have not waited for it
  uint32_t landed = 0;           // those of them whose bytes have landed early
  int line = 0;
  uint64_t seq = 0;
  uint32_t dst[32];
  uint64_t src[32];
  uint32_t srcBytes[32];
  uint32_t group[32];
  VClock issued;
};

struct PendingWgmma {
  const Inst* inst;
  uint64_t descA, descB;
  uint32_t group;
  bool scaleD;
  VClock issued, issuedProxy;
};

// A bulk store: reads shared memory late, at wait_group or block end.
struct PendingBulkStore {
  int lane;
  uint32_t group;
  int line;
  std::function<void()> run;
};

struct Warp {
  uint8_t* base[2] = {nullptr, nullptr};  // registers, constants
  uint32_t m = 0;                         // lanes executing the current instruction
  uint32_t pc = 0, npc = 0;
  uint32_t active = 0;  // lanes of the current group
  Event ev = Event::None;
  uint32_t splitMask = 0, splitPc = 0, syncNeed = 0;
  bool syncWarpBarrier = false;
  uint32_t live = 0;        // lanes that have not exited
  uint32_t minOther = ~0u;  // lowest pc of another runnable group
  std::vector<Group> others;
  bool hasCurrent = true;
  int forcedSlices = 0, slicesSinceSwitch = 0;
  int id = 0;       // within the block
  int clockId = 0;  // vector clock component
  Block* block = nullptr;
  Launch* launch = nullptr;
  Stats* st = nullptr;
  uint8_t* local = nullptr;
  uint32_t localBytes = 0;
  bool polled = false;  // this slice ended in a failed poll
  uint64_t issued = 0;

  std::vector<uint8_t> regStore, localStore;
  std::vector<CpAsync> cpAsync;
  uint32_t cpGroup[32] = {};
  uint64_t cpSeq = 0;
  uint32_t clusterPhase[32] = {};
  std::vector<PendingWgmma> wgmma;
  uint32_t wgmmaGroup = 0;
  bool wgmmaFenced = false;                         // wgmma.fence was executed
  std::unordered_map<int, const Inst*> wgmmaDirty;  // registers written since, and by what
  std::vector<PendingBulkStore> bulkStores;
  uint32_t bulkGroup[32] = {};
  VClock vc, proxy;                 // see race.h
  std::unique_ptr<LaneRace> lanes;  // when races between lanes are looked for

  template <class T>
  T* reg(const Operand& o) {
    return (T*)(base[o.file] + o.off);
  }
  uint32_t pred(const Operand& o) { return *(uint32_t*)(base[o.file] + o.off) ^ (o.neg ? ~0u : 0u); }
  void setPred(const Operand& o, uint32_t v) {
    if (!o.present) return;
    uint32_t& d = *(uint32_t*)(base[0] + o.off);
    d = (d & ~m) | (v & m);
  }
  int firstLane() const { return __builtin_ctz(m); }
  // Value of a warp-uniform 32/64-bit operand, taken from the first active lane.
  uint64_t uniform(const Operand& o) {
    int l = firstLane();
    return o.width == 8 ? reg<uint64_t>(o)[l] : o.width == 2 ? reg<uint16_t>(o)[l] : reg<uint32_t>(o)[l];
  }
};

struct GlobalWord {
  RaceShadow::Write write;
  std::vector<std::pair<uint32_t, int32_t>> reads;  // epoch and line by warp
};

struct BarrierWait {
  Warp* warp;
  uint32_t mask;
  uint32_t pc;
  const Inst* inst;
};
struct BlockBarrier {
  uint32_t arrived = 0, expected = 0;  // threads
  uint32_t redPop = 0, redOr = 0, redAnd = 1;
  std::vector<BarrierWait> waiters;
  VClock vc, proxy;
};

// Clocks of an mbarrier (or of a word used for synchronisation): those of the
// running phase, and those of the completed ones, which waiters acquire.
struct MbarrierSync {
  VClock vc, proxy, doneVc, doneProxy;
};

// Work that completes on an mbarrier later than its issue.
struct PendingAsync {
  std::function<void()> run;
};

struct Block {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  uint32_t idx[3];
  uint64_t linear = 0;
  int rank = 0;                 // in the cluster
  std::vector<uint8_t> shared;  // from kSharedBase
  uint32_t sharedEnd = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  BlockBarrier bars[16];
  int liveThreads = 0, liveWarps = 0;
  std::vector<int> order;
  bool done = false;
  RaceShadow race;
  std::unordered_map<uint64_t, GlobalWord> globalRace;  // by address / 4
  std::vector<VClock> wgmmaReads;                       // per warpgroup: completed asynchronous reads
  std::unordered_map<uint32_t, MbarrierSync> mbarSync;  // by shared offset
  std::unordered_map<uint32_t, std::deque<PendingAsync>> mbarPending;

  uint8_t* sharedPtr(uint32_t addr) { return shared.data() + (addr - kSharedBase); }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t dim[3], idx[3];
  uint32_t arrived = 0, phase = 0;  // barrier.cluster
  std::vector<BarrierWait> waiters;
  VClock vc, proxy, doneVc, doneProxy;
  int warpClocks = 0;  // components of warps; async engines follow
  std::vector<uint32_t> engineEpoch;
  int liveThreads = 0;
  bool done = false;
};
constexpr int kAsyncEngines = 16;

struct LaunchConfig {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
  uint32_t dynamicShared = 0;
  bool cooperative = false;
};

// What the workers of one launch share.
struct GridWork {
  std::atomic<uint64_t> next{0}, progress{0};
  uint64_t total = 0;
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::unique_ptr<Fault> fault;
};

// One worker's view of a launch (there is one worker unless CUDASIM_THREADS says otherwise).
struct Launch {
  GridWork* work = nullptr;
  bool parallel = false;
  Kernel* kernel = nullptr;
  LaunchConfig cfg;
  uint64_t id = 0;
  Stats* stats = nullptr;
  std::mt19937_64 rng;
  uint64_t progress = 0;  // bumped by anything another warp could wait for
  uint32_t clusterBlocks = 1;
  uint32_t threads = 1, warpsPerBlock = 1;
  std::vector<std::unique_ptr<Cluster>> resident, spare;
  bool raceOn = false;
  uint32_t epochBase = 0;
  uint64_t instructions = 0;
  bool asyncEarly();  // decides by the seed whether an async copy lands at once
};

// --- scheduler.cpp
// Runs a kernel to completion; throws a located Fault.
void runLaunch(Kernel& k, const LaunchConfig& cfg, const void* params);
uint8_t* gridWorkspace();
// --- block_barrier.cpp
void checkBarrier(Block& b, int id);  // releases it when complete
void checkClusterBarrier(Cluster& c);
// --- warp_scheduler.cpp
void waitAtBarrier(Warp& w, uint32_t resumePc);  // queues the lanes in w.m
// True when all live lanes of `need` take part in the current instruction;
// otherwise the warp waits and the handler must return.
bool converge(Warp& w, uint32_t need, bool warpBarrier = false);
void finishAsync(Block& b);  // bulk_copy.cpp: what a block left pending
struct Config {
  int arch = 90;
  uint64_t seed = 0;
  int race = 1;         // 0 off, 1 report, 2 fail the launch
  int strict = -1;      // -1: when a range was registered or the program allocated memory
  bool uninit = false;  // report reads of shared memory never written
  std::string statsFile;
  uint64_t maxInstructions = 4000000000ull;  // warp instructions per launch
  bool verbose = false;
  int threads = 1;             // workers that run independent blocks
  int slice = 192;             // instructions a warp runs before the next one gets its turn
  bool raceWarp = false;       // also look for races between the lanes of a warp
  bool raceGlobal = false;     // also look for races of one block in global memory
  bool tensorTruncate = true;  // tensor cores add as tensor_sum.cpp says
  int multiprocessors = 0;     // that the device says it has; 0: as many as the product
  bool approxError = false;    // approximate instructions err as approximate.cpp says
};
Config& config();

// --- memory.cpp (address resolution)
enum class Access : uint8_t { Read, Write, Atomic };
struct Lanes {
  uint8_t* p[32];
  uint32_t sharedMask = 0;
};
// Turns lane addresses into host pointers and checks them. `bytes` is the
// access size of one lane.
void resolve(Warp& w, const Inst& I, Space space, const uint64_t* addr, uint32_t bytes, Access a, Lanes& out,
             bool shadow = true);
uint8_t* resolveOne(Warp& w, Space space, uint64_t addr, uint32_t bytes, uint32_t align, Access a, int lane);
// Shared address (own or cluster window) to block and offset.
Block* sharedTarget(Warp& w, uint64_t addr, uint32_t bytes, int lane, uint32_t& off);
void checkGlobal(uint64_t addr, uint64_t bytes, Access a, int lane, const char* what);

}  // namespace cudasim
