// Helpers shared by the instructions that address memory.
#pragma once
#include <vector>

#include "machine.h"

namespace cudasim {
class Decoder;
struct PtxOperand;
struct B128 {
  uint64_t a, b;
};
void laneAddresses(Warp& w, const Operand& o, int64_t disp, uint64_t* addr);
bool isCacheModifier(const std::string& s);
Space spaceOf(Decoder& d);
Cls memoryClass(Space s);
// The registers of an operand or of a vector operand; a destination may be a sink.
std::vector<Operand> elements(Decoder& d, const PtxOperand& o, Ty t, bool dst);
void syncOnWord(Warp& w, uint64_t addr, int lane, bool acq, bool rel);
// Reports a store of `bytes` per lane to the race detector; lane i's data is at data + i * stride.
void shadowStore(Warp& w, const Lanes& l, const uint64_t* addr, uint32_t bytes, int line, const uint8_t* data,
                 uint32_t stride);
// --- exec_atomic.cpp. Held during atomics when several workers run blocks.
struct AtomicLock {
  bool locked;
  explicit AtomicLock(Warp& w);
  ~AtomicLock();
  static void abandon();  // after a memory fault, which skips destructors
};
uint64_t atomElement(int op, Ty t, uint64_t old, uint64_t b, uint64_t c);
int parseAtomOp(Decoder& d);
}  // namespace cudasim
