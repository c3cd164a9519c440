// Instructions that do nothing, so that a test can see whether what they guarded against is caught.
#include <atomic>
#include <vector>

#include "../cudasim.h"
#include "machine.h"
#include "runtime_registry.h"

namespace cudasim {
namespace {

struct Dropped {
  Inst* inst;
  Handler before;
};
std::vector<Dropped>& dropped() {
  static auto* d = new std::vector<Dropped>;
  return *d;
}

std::atomic<uint64_t> reached{0};

// A wait that a loop asks again and again has always ended.
void doNothing(Warp& w, const Inst& I) {
  reached++;
  const Operand& result = I.op[0];
  if (I.nops > 0 && result.present && result.def && result.width == 0) w.setPred(result, w.m);
}

bool begins(const PtxInst& inst, const std::string& opcode) {
  std::string name;
  for (auto& part : inst.op) name += (name.empty() ? "" : ".") + part;
  return name.rfind(opcode, 0) == 0;
}

Kernel* registeredKernel(const std::string& name) {
  for (auto& [handle, function] : state().functions)
    if (function.name == name) return kernelOf(function);
  return nullptr;
}

}  // namespace
}  // namespace cudasim

using namespace cudasim;

extern "C" {

int cudasim_drop(const char* kernel, const char* opcode, int index) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  Kernel* k = registeredKernel(kernel);
  if (!k) return -1;
  int found = 0;
  for (const PtxInst& p : k->fn->insts) {
    if (!begins(p, opcode) || found++ != index) continue;
    for (Inst& inst : k->code) {
      if (inst.line != p.line) continue;
      dropped().push_back({&inst, inst.fn});
      inst.fn = doNothing;
    }
  }
  return found;
}

uint64_t cudasim_restore(void) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  for (auto d = dropped().rbegin(); d != dropped().rend(); ++d) d->inst->fn = d->before;
  dropped().clear();
  return reached.exchange(0);
}

}  // extern "C"
