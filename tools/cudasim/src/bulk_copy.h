// What bulk copies, tensor copies and asynchronous stores share.
#pragma once
#include <algorithm>
#include <functional>

#include "async.h"
#include "decoder.h"
#include "exec_memory.h"
#include "lanes.h"
#include "tensor_map.h"

namespace cudasim {

// Async-proxy actor of a load that completes on an mbarrier.
struct Engine {
  VClock seen;
  int who = 0;
  uint32_t epoch = 0;
};
Engine makeEngine(Block& dst, uint32_t mbarOff, const VClock& issued);
void completeOn(Block& dst, uint32_t mbarOff, const Engine& a, uint32_t bytes);
void writeShared(Block& b, uint32_t off, uint32_t bytes, const uint8_t* data, const Engine& a, int line);
void queueLoad(Warp& w, Block& dst, uint32_t mbarOff, std::function<void()> f);
void reduceInto(uint8_t* dst, const uint8_t* src, uint32_t bytes, int op, Ty t);

// A bulk load is pending from its issue until it lands.
void markBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes, int line);
void unmarkBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes);

void checkAligned(uint64_t a, uint32_t align, int lane, const char* what);
uint64_t plainShared(uint64_t a);
int64_t* keepDisps(Decoder& d);  // three displacements that live as long as the kernel

struct BulkInfo {
  bool tensor = false, toShared = false, fromShared = false, multicast = false, reduce = false;
  int dims = 0, redOp = 0;
  Ty redType = Ty::None;
  int line = 0;
};

void bulkLoadH(Warp& w, const Inst& I);   // bulk_load.cpp
void bulkStoreH(Warp& w, const Inst& I);  // bulk_store.cpp
void runStores(Warp& w, const std::function<bool(const PendingBulkStore&)>& due);

}  // namespace cudasim
