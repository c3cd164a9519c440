// Shared memory that an asynchronous copy is about to write. The race detector
// compares warps; an access by the very warp that issued the copy is ordered
// like any other for it, and this file finds the missing wait.
//
// cp.async counts as pending until its thread waits for it, even if a seed made
// the bytes land early; bulk copies until they land.
#include "machine.h"
#include "race.h"

namespace cudasim {

namespace {
constexpr uint16_t kNobody = 0xffff;
uint64_t wordSource(uint32_t word, uint32_t off, uint64_t src, uint32_t srcBytes) {
  const uint32_t at = word * 4 - off;
  return at < srcBytes ? src + at : 0;
}
}  // namespace

void markPending(Block& b, uint32_t off, uint32_t bytes, int who, int line, uint64_t src, uint32_t srcBytes) {
  RaceShadow& s = b.race;
  off -= kSharedBase;
  const size_t words = (b.sharedEnd - kSharedBase + 3) / 4;
  if (s.pending.size() < words) s.pending.resize(words);
  for (uint32_t w = off / 4; w * 4 < off + bytes; w++) {
    PendingCopy& p = s.pending[w];
    if (p.count++ == 0) s.pendingWords++;
    p.who = (uint16_t)who;
    p.line = line;
    p.src = wordSource(w, off, src, srcBytes);
  }
}

void unmarkPending(Block& b, uint32_t off, uint32_t bytes, int who) {
  RaceShadow& s = b.race;
  off -= kSharedBase;
  for (uint32_t w = off / 4; w * 4 < off + bytes; w++) {
    PendingCopy& p = s.pending[w];
    if (--p.count == 0)
      s.pendingWords--;
    else if (p.who == who)
      p.who = kNobody;  // the issuer of the remaining one is not known
  }
}

void checkPending(Warp& w, Block& b, uint32_t off, uint32_t bytes, int line, bool write, uint64_t src,
                  uint32_t srcBytes) {
  RaceShadow& s = b.race;
  if (!s.pendingWords) return;
  off -= kSharedBase;
  for (uint32_t i = off / 4; i * 4 < off + bytes; i++) {
    const PendingCopy& p = s.pending[i];
    if (!p.count || p.who != w.clockId) continue;
    if (src != ~0ull && p.src == wordSource(i, off, src, srcBytes)) continue;  // both write the same
    reportRace(b,
               write ? "write of shared memory with a pending asynchronous copy that was not waited for"
                     : "read of shared memory with a pending asynchronous copy that was not waited for",
               sharedPlace(i * 4), w.clockId, line, p.who, p.line, 9);
    return;
  }
}

}  // namespace cudasim
