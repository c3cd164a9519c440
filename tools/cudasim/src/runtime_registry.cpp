// Registration of fat binaries, kernels and variables, and what asks for a registered variable.
#include "runtime_registry.h"

#include <cstring>

#include "fatbin.h"

namespace cudasim {

State& state() {
  static State* s = new State;
  return *s;
}

namespace {

Module* moduleOf(FatbinHandle& h) {
  if (!h.loaded) {
    h.loaded = true;
    try {
      std::vector<PtxImage> images = readFatbin(h.wrapper);
      int i = chooseImage(images, config().arch);
      if (i < 0) {
        std::string have;
        for (auto& m : images) have += format(" sm_%d%.1s", m.arch, m.suffix ? &m.suffix : "");
        throw Fault(kNoKernelImage,
                    format("the fat binary has no PTX for sm_%d (found:%s); compile with -gencode "
                           "arch=compute_%d,code=compute_%d and without -rdc=true",
                           config().arch, have.empty() ? " none" : have.c_str(), config().arch, config().arch));
      }
      h.module.reset(new Module(std::move(images[i].text)));
    } catch (Fault& f) {
      h.error = f.what();
      reportFault(f);
    }
  }
  return h.module.get();
}

}  // namespace

HostFunction* findFunction(const void* f) {
  auto& s = state();
  auto it = s.functions.find(f);
  return it == s.functions.end() ? nullptr : &it->second;
}
Kernel* kernelOf(HostFunction& f) {
  if (f.kernel) return f.kernel;
  Module* m = moduleOf(*f.fatbin);
  if (!m) return nullptr;
  f.kernel = m->kernel(f.name);
  if (!f.kernel) reportFault(Fault(kInvalidDeviceFunction, "kernel " + f.name + " is not in the PTX of its module"));
  return f.kernel;
}

uint8_t* symbolAddress(const void* sym, size_t* size) {
  auto& s = state();
  auto it = s.vars.find(sym);
  if (it == s.vars.end()) return nullptr;
  Module* m = moduleOf(*it->second.fatbin);
  if (!m) return nullptr;
  auto g = m->globals.find(it->second.name);
  if (g == m->globals.end()) return nullptr;
  if (size) *size = it->second.size;
  return g->second.first;
}

}  // namespace cudasim

using namespace cudasim;

extern "C" {

// --- called by nvcc-generated code
void** __cudaRegisterFatBinary(void* wrapper) {
  auto* h = new FatbinHandle;
  h->wrapper = wrapper;
  return (void**)h;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) {
  // Kernels and variables may still be referenced by other exit handlers.
  auto* h = (FatbinHandle*)handle;
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  auto& s = state();
  for (auto it = s.functions.begin(); it != s.functions.end();)
    if (it->second.fatbin == h)
      it = s.functions.erase(it);
    else
      ++it;
  for (auto it = s.vars.begin(); it != s.vars.end();)
    if (it->second.fatbin == h)
      it = s.vars.erase(it);
    else
      ++it;
  delete h;
}
void __cudaRegisterFunction(void** handle, const char* hostFun, char*, const char* deviceName, int, void*, void*, void*,
                            void*, int*) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction f;
  f.fatbin = (FatbinHandle*)handle;
  f.name = deviceName;
  state().functions[hostFun] = f;
}
void __cudaRegisterVar(void** handle, char* hostVar, char*, const char* deviceName, int, size_t size, int, int) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().vars[hostVar] = {(FatbinHandle*)handle, deviceName, size};
}
void __cudaRegisterManagedVar(void** handle, void** hostPtr, char*, const char* deviceName, int, size_t size, int,
                              int) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().vars[hostPtr] = {(FatbinHandle*)handle, deviceName, size};
  *hostPtr = symbolAddress(hostPtr, nullptr);
}
char __cudaInitModule(void** handle) {
  return moduleOf(*(FatbinHandle*)handle) != nullptr;
}
void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}

// --- variables
int cudaGetSymbolAddress(void** p, const void* sym) {
  *p = symbolAddress(sym, nullptr);
  return *p ? kSuccess : fail(kInvalidSymbol);
}
int cudaGetSymbolSize(size_t* n, const void* sym) {
  return symbolAddress(sym, n) ? kSuccess : fail(kInvalidSymbol);
}
int cudaMemcpyToSymbol(const void* sym, const void* src, size_t n, size_t off, int) {
  size_t size;
  uint8_t* p = symbolAddress(sym, &size);
  if (!p) return fail(kInvalidSymbol);
  if (off + n > size) return fail(kInvalidValue);
  memcpy(p + off, src, n);
  return kSuccess;
}
int cudaMemcpyToSymbolAsync(const void* sym, const void* src, size_t n, size_t off, int k, void*) {
  return cudaMemcpyToSymbol(sym, src, n, off, k);
}
int cudaMemcpyFromSymbol(void* dst, const void* sym, size_t n, size_t off, int) {
  size_t size;
  uint8_t* p = symbolAddress(sym, &size);
  if (!p) return fail(kInvalidSymbol);
  if (off + n > size) return fail(kInvalidValue);
  memcpy(dst, p + off, n);
  return kSuccess;
}
int cudaMemcpyFromSymbolAsync(void* dst, const void* sym, size_t n, size_t off, int k, void*) {
  return cudaMemcpyFromSymbol(dst, sym, n, off, k);
}

}  // extern "C"
