#include "module.h"

#include <cstdlib>
#include <cstring>

#include "fault.h"
#include "memory.h"

namespace cudasim {

Module::Module(std::string text) : ptx(parsePtx(std::move(text))) {
  for (auto& v : ptx->vars)
    if (v.space == Space::Const) constBytes = (constBytes + 255) / 256 * 256 + (v.size ? v.size : 8);
  if (constBytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, constBytes)) throw std::bad_alloc();
    memset(p, 0, constBytes);
    constBase = (uint8_t*)p;
    registerRange(p, constBytes, "constant variables", false);
  }
  uint64_t constNext = 0;
  for (auto& v : ptx->vars) {
    if (v.space == Space::Const) {
      constNext = (constNext + 255) / 256 * 256;
      globals[v.name] = {constBase + constNext, v.size};
      constNext += v.size ? v.size : 8;
      continue;
    }
    if (v.space != Space::Global) continue;
    size_t n = v.size ? v.size : 8;
    void* p = nullptr;
    if (posix_memalign(&p, v.align < 256 ? 256 : v.align, n)) throw std::bad_alloc();
    memset(p, 0, n);
    globals[v.name] = {(uint8_t*)p, v.size};
    registerRange(p, n, v.name, false);
  }
  for (auto& v : ptx->vars) {
    auto it = globals.find(v.name);
    if (it == globals.end()) continue;
    size_t es = tySize(v.type);
    for (size_t i = 0; i < v.init.size() && (i + 1) * es <= v.size; i++) {
      uint64_t bits = v.init[i].bits;
      if (!v.init[i].symbol.empty()) {
        auto s = globals.find(v.init[i].symbol);
        if (s != globals.end())
          bits += (uint64_t)s->second.first;
        else {
          bool found = false;
          auto def = ptx->functionIndex.find(v.init[i].symbol);  // the definition, not a declaration
          for (size_t f = 0; f < ptx->functions.size() && def != ptx->functionIndex.end(); f++)
            if (ptx->functions[f].get() == def->second) {
              bits += kFunctionWindow | (f + 1);
              found = true;
            }
          if (!found)
            throw Fault(kFaultInvalidPtx, format("PTX line %d: initialiser names the unknown symbol '%s'", v.line,
                                                 v.init[i].symbol.c_str()));
        }
      }
      memcpy(it->second.first + i * es, &bits, es < 8 ? es : 8);
    }
  }
}

Module::~Module() {
  for (auto& [n, g] : globals)
    if (!(g.first >= constBase && g.first < constBase + constBytes)) {
      unregisterRange(g.first);
      free(g.first);
    }
  unregisterRange(constBase);
  free(constBase);
}

Kernel* Module::kernel(const std::string& name) {
  auto it = kernels.find(name);
  if (it != kernels.end()) return it->second.get();
  auto f = ptx->functionIndex.find(name);
  if (f == ptx->functionIndex.end() || !f->second->isEntry) return nullptr;
  auto k = decodeKernel(*this, *f->second);
  registerRange(k->paramData, k->paramBytes + 16, "kernel parameters", false);
  return (kernels[name] = std::move(k)).get();
}

}  // namespace cudasim
