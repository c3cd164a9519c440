// Hints, which do nothing here, and the few instructions that act on the thread alone: discard, nanosleep, trap.
#include "decoder.h"
#include "exec_memory.h"
#include "lanes.h"

namespace cudasim {

namespace {
void nop(Warp&, const Inst&) {}
OpcodeEntry ePrefetch({"prefetch", "prefetchu", "applypriority", "griddepcontrol", "pmevent", "setmaxnreg"},
                      [](Decoder& d) { d.emit(nop, Cls::Other); });
// discard makes the bytes undefined, which is what it does here too.
void discardH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) { memset(resolveOne(w, Space::None, addr[i], 128, 128, Access::Write, i), 0xff, 128); });
}
OpcodeEntry eDiscard({"discard"}, [](Decoder& d) {
  int64_t disp;
  Operand b = d.addressBase(d.arg(0), disp, Space::None);
  d.emit(discardH, Cls::Other, {b}).imm = disp;
});
void zero64(Warp& w, const Inst& I) {
  uint64_t* d = w.reg<uint64_t>(I.op[0]);
  CUDASIM_LANES((uint64_t)0x12f0000000000000ull);
}
OpcodeEntry ePolicy({"createpolicy"}, [](Decoder& d) { d.emit(zero64, Cls::Other, {d.dst(d.arg(0), Ty::B64)}); });
void yieldH(Warp& w, const Inst&) {
  w.ev = Event::Yield;
}
OpcodeEntry eNanosleep({"nanosleep"}, [](Decoder& d) { d.emit(yieldH, Cls::Other); });
void trapH(Warp& w, const Inst&) {
  throw Fault(kFaultTrap, "trap instruction executed", w.firstLane());
}
OpcodeEntry eTrap({"trap", "brkpt"}, [](Decoder& d) { d.emit(trapH, Cls::Other); });

}  // namespace
}  // namespace cudasim
