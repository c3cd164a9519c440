// How asynchronous copies act on shared memory: as an actor of their own in the race detector, complete on an mbarrier.
#include "bulk_copy.h"

namespace cudasim {

Engine makeEngine(Block& dst, uint32_t mbarOff, const VClock& issued) {
  Engine a;
  if (!dst.launch->raceOn) return a;
  a.seen = issued;
  a.who = asyncEngine(dst, mbarOff);
  a.epoch = ++dst.cluster->engineEpoch[a.who - dst.cluster->warpClocks];
  return a;
}
void completeOn(Block& dst, uint32_t mbarOff, const Engine& a, uint32_t bytes) {
  if (dst.launch->raceOn) {
    VClock c = a.seen;
    c[a.who] = std::max(c[a.who], a.epoch);
    MbarrierSync& y = dst.mbarSync[mbarOff];
    joinClock(y.vc, c);
    joinClock(y.proxy, c);
  }
  dst.launch->progress++;
  mbarCompleteTx(dst, mbarOff, bytes);
}
void writeShared(Block& b, uint32_t off, uint32_t bytes, const uint8_t* data, const Engine& a, int line) {
  if (b.launch->raceOn) {
    RaceActor r = {a.who, a.epoch, &a.seen, &a.seen, line};
    raceWrite(b, off, bytes, r, data);
  }
  memcpy(b.sharedPtr(off), data, bytes);
}

void queueLoad(Warp& w, Block& dst, uint32_t mbarOff, std::function<void()> f) {
  if (w.launch->asyncEarly())
    f();
  else
    queueOnMbarrier(dst, mbarOff, std::move(f));
}

void reduceInto(uint8_t* dst, const uint8_t* src, uint32_t bytes, int op, Ty t) {
  const int es = tySize(t);
  for (uint32_t i = 0; i + es <= bytes; i += es) {
    uint64_t a = 0, b = 0;
    memcpy(&a, dst + i, es);
    memcpy(&b, src + i, es);
    uint64_t v = atomElement(op, t, a, b, 0);
    memcpy(dst + i, &v, es);
  }
}

void markBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes, int line) {
  if (!w.launch->raceOn || !bytes) return;
  checkPending(w, b, off, bytes, line, true);
  markPending(b, off, bytes, w.clockId, line, 1, bytes);  // like no other source
}
void unmarkBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes) {
  if (w.launch->raceOn && bytes) unmarkPending(b, off, bytes, w.clockId);
}

void checkAligned(uint64_t a, uint32_t align, int lane, const char* what) {
  if (a & (align - 1))
    throw Fault(kFaultMisaligned,
                format("%s address 0x%llx is not %u-byte aligned", what, (unsigned long long)a, align), lane);
}
uint64_t plainShared(uint64_t a) {
  return (a & kWindowMask) == kSharedWindow ? a & ~kWindowMask : a;
}

int64_t* keepDisps(Decoder& d) {
  auto v = std::make_shared<std::vector<int64_t>>(3, 0);
  d.kernel().auxStore.push_back(v);
  return v->data();
}

}  // namespace cudasim
