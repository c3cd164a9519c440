// Asynchronous copies and mbarriers.
#pragma once
#include "machine.h"

namespace cudasim {
class Decoder;
void decodeBulk(Decoder& d);             // bulk_copy.cpp
void decodeStAsync(Decoder& d);          // async_store.cpp
void decodeRedAsync(Decoder& d);         // async_store.cpp
void decodeStBulk(Decoder& d);           // async_store.cpp
void decodeCpAsyncMbarrier(Decoder& d);  // mbarrier.cpp
// Lands the non-bulk copies that `lanes` issued before `seq`.
void landAllCpAsync(Warp& w, uint32_t lanes, uint64_t seq = ~0ull);

// --- mbarrier.cpp
struct MbarAddress {
  Block* block;
  uint32_t off;
};
MbarAddress mbarAddress(Warp& w, uint64_t addr, int lane);
void mbarCompleteTx(Block& b, uint32_t off, uint32_t bytes);
void mbarArriveCount(Block& b, uint32_t off, uint32_t count);
// Queues work that completes on the mbarrier; a wait on it makes it happen.
void queueOnMbarrier(Block& b, uint32_t off, std::function<void()> run);
void landMbarrier(Block& b, uint32_t off);
int asyncEngine(const Block& b, uint32_t mbarOff);  // vector clock component

}  // namespace cudasim
