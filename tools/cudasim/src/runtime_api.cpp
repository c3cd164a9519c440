// The CUDA runtime entry points: registration, launches, memory, errors. The
// others are in runtime_device.cpp.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_abi.h"
#include "fatbin.h"
#include "machine.h"
#include "memory.h"
#include "module.h"
#include "runtime.h"
#include "stream_capture.h"

namespace cudasim {

thread_local int tlLastError = 0;
int g_pendingFault = 0;
std::string g_faultText;
int g_faultCode = 0;

int fail(int code) {
  tlLastError = code;
  return code;
}
void reportFault(const Fault& f) {
  g_faultText = f.what();
  g_faultCode = f.code;
  g_pendingFault = f.code;
  tlLastError = f.code;
  fprintf(stderr, "cudasim: %s\n", f.what());
}

namespace {

struct FatbinHandle {
  const void* wrapper = nullptr;
  std::unique_ptr<Module> module;
  bool loaded = false;
  std::string error;
};
struct HostFunction {
  FatbinHandle* fatbin;
  std::string name;
  Kernel* kernel = nullptr;
  int maxDynamic = 48 * 1024;
  bool nonPortable = false;
};
struct HostVar {
  FatbinHandle* fatbin;
  std::string name;
  size_t size;
};

struct State {
  std::recursive_mutex mutex;
  std::map<const void*, HostFunction> functions;
  std::map<const void*, HostVar> vars;
};
State& state() {
  static State* s = new State;
  return *s;
}

struct CallConfig {
  dim3 grid, block;
  size_t smem;
  void* stream;
};
thread_local std::vector<CallConfig> tlCalls;

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

}  // namespace

uint32_t maxShared() {
  return config().arch >= 90 ? 227 * 1024 : 163 * 1024;
}

int launchKernel(Kernel& k, const LaunchConfig& c, void** args, int maxDynamic, bool nonPortable) {
  uint64_t threads = (uint64_t)c.block[0] * c.block[1] * c.block[2];
  uint64_t blocks = (uint64_t)c.grid[0] * c.grid[1] * c.grid[2];
  const PtxFunction& f = *k.fn;
  auto reject = [&](int code, const std::string& why) {
    g_faultText = "launch of " + k.title + " rejected: " + why;
    g_faultCode = code;
    fprintf(stderr, "cudasim: %s\n", g_faultText.c_str());
    return fail(code);
  };
  if (!threads || !blocks || threads > 1024 || c.block[2] > 64 || c.grid[1] > 65535 || c.grid[2] > 65535)
    return reject(kInvalidConfiguration, format("grid (%u,%u,%u), block (%u,%u,%u)", c.grid[0], c.grid[1], c.grid[2],
                                                c.block[0], c.block[1], c.block[2]));
  if (f.maxThreads && threads > (uint64_t)f.maxThreads)
    return reject(kInvalidConfiguration,
                  format("%llu threads exceed .maxntid %d", (unsigned long long)threads, f.maxThreads));
  if (f.reqThreads[0])
    for (int i = 0; i < 3; i++)
      if (c.block[i] != (uint32_t)f.reqThreads[i])
        return reject(kInvalidConfiguration, "the block differs from .reqntid");
  if (c.dynamicShared > (uint32_t)maxDynamic)
    return reject(kInvalidValue,
                  format("%u bytes of dynamic shared memory, %d allowed (cudaFuncAttributeMaxDynamicSharedMemorySize)",
                         c.dynamicShared, maxDynamic));
  if (k.staticShared - kSharedBase + c.dynamicShared > maxShared())
    return reject(kInvalidValue, "too much shared memory");
  for (int i = 0; i < 3; i++)
    if (c.cluster[i] == 0 || c.grid[i] % c.cluster[i])
      return reject(kInvalidConfiguration, "the grid is not a multiple of the cluster");
  if (c.cluster[0] * c.cluster[1] * c.cluster[2] > (nonPortable ? 16u : 8u))
    return reject(kInvalidConfiguration,
                  "too many blocks in a cluster (more than 8 need cudaFuncAttributeNonPortableClusterSizeAllowed)");
  std::vector<uint8_t> params(k.paramBytes + 1);
  for (size_t i = 0; i < k.params.size(); i++) memcpy(&params[k.params[i].offset], args[i], k.params[i].size);
  if (config().verbose)
    fprintf(stderr, "cudasim: launch %s grid (%u,%u,%u) block (%u,%u,%u) cluster (%u,%u,%u) smem %u\n",
            k.pretty.c_str(), c.grid[0], c.grid[1], c.grid[2], c.block[0], c.block[1], c.block[2], c.cluster[0],
            c.cluster[1], c.cluster[2], c.dynamicShared);
  try {
    runLaunch(k, c, params.data());
  } catch (Fault& e) {
    reportFault(e);
    return e.code;
  }
  return kSuccess;
}

LaunchConfig makeConfig(const Kernel& k, dim3 g, dim3 b, size_t smem) {
  LaunchConfig c;
  c.grid[0] = g.x;
  c.grid[1] = g.y;
  c.grid[2] = g.z;
  c.block[0] = b.x;
  c.block[1] = b.y;
  c.block[2] = b.z;
  if (k.fn->reqCluster[0])
    for (int i = 0; i < 3; i++) c.cluster[i] = (uint32_t)k.fn->reqCluster[i];
  c.dynamicShared = (uint32_t)smem;
  return c;
}

namespace {

int launchHost(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* stream,
               const AbiLaunchConfig* ex = nullptr, bool cooperative = false) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f = findFunction(func);
  if (!f) return fail(kInvalidDeviceFunction);
  Kernel* k;
  try {
    k = kernelOf(*f);
  } catch (Fault& e) {
    reportFault(e);
    return e.code;
  }
  if (!k) return fail(kInvalidDeviceFunction);
  LaunchConfig c = makeConfig(*k, g, b, smem);
  c.cooperative = cooperative;
  for (unsigned i = 0; ex && i < ex->numAttrs; i++) {
    const AbiLaunchAttribute& a = ex->attrs[i];
    if (a.id == 2) c.cooperative = a.val.i != 0;
    if (a.id == 4)
      for (int j = 0; j < 3; j++) c.cluster[j] = std::max(1u, a.val.cluster[j]);
  }
  if (!capturing(stream)) return launchKernel(*k, c, args, f->maxDynamic, f->nonPortable);
  std::vector<std::vector<uint8_t>> values;  // arguments are taken when the launch is captured
  for (size_t i = 0; i < k->params.size(); i++)
    values.emplace_back((uint8_t*)args[i], (uint8_t*)args[i] + k->params[i].size);
  const int maxDynamic = f->maxDynamic;
  const bool nonPortable = f->nonPortable;
  return onStream(stream, [=]() mutable {
    std::vector<void*> p;
    for (auto& v : values) p.push_back(v.data());
    return launchKernel(*k, c, p.data(), maxDynamic, nonPortable);
  });
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

int occupancy(const HostFunction& f, Kernel& k, int threads, size_t dyn) {
  if (threads <= 0 || threads > 1024) return 0;
  int warps = (threads + 31) / 32;
  int byThreads = 2048 / (warps * 32), byBlocks = 32;
  size_t smem = k.staticShared - kSharedBase + dyn + 1024, total = (size_t)(config().arch >= 90 ? 228 : 164) * 1024;
  if ((int)dyn > f.maxDynamic || smem - 1024 > maxShared()) return 0;
  return (int)std::min<size_t>({(size_t)byThreads, (size_t)byBlocks, total / smem});
}

const std::map<int, std::pair<const char*, const char*>>& errorTable() {
  static const std::map<int, std::pair<const char*, const char*>> t = {
      {0, {"cudaSuccess", "no error"}},
      {1, {"cudaErrorInvalidValue", "invalid argument"}},
      {2, {"cudaErrorMemoryAllocation", "out of memory"}},
      {9, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
      {13, {"cudaErrorInvalidSymbol", "invalid device symbol"}},
      {17, {"cudaErrorInvalidDevicePointer", "invalid device pointer"}},
      {98, {"cudaErrorInvalidDeviceFunction", "invalid device function"}},
      {101, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
      {209, {"cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"}},
      {218, {"cudaErrorInvalidPtx", "a PTX JIT compilation failed"}},
      {400, {"cudaErrorInvalidResourceHandle", "invalid resource handle"}},
      {500, {"cudaErrorSymbolNotFound", "named symbol not found"}},
      {600, {"cudaErrorNotReady", "device not ready"}},
      {700, {"cudaErrorIllegalAddress", "an illegal memory access was encountered"}},
      {701, {"cudaErrorLaunchOutOfResources", "too many resources requested for launch"}},
      {702, {"cudaErrorLaunchTimeout", "the launch timed out and was terminated"}},
      {710, {"cudaErrorAssert", "device-side assert triggered"}},
      {715, {"cudaErrorIllegalInstruction", "an illegal instruction was encountered"}},
      {716, {"cudaErrorMisalignedAddress", "misaligned address"}},
      {719, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
      {801, {"cudaErrorNotSupported", "operation not supported"}},
      {999, {"cudaErrorUnknown", "unknown error"}}};
  return t;
}

int copy2D(void* dst, size_t dp, const void* src, size_t sp, size_t width, size_t height) {
  if (width > dp || width > sp) return fail(kInvalidValue);
  for (size_t i = 0; i < height; i++) memmove((char*)dst + i * dp, (const char*)src + i * sp, width);
  return kSuccess;
}

}  // namespace
}  // namespace cudasim

using namespace cudasim;

extern "C" {

// --- registration by nvcc-generated code
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
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t smem, void* stream) {
  tlCalls.push_back({g, b, smem, stream});
  return 0;
}
int __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* smem, void* stream) {
  if (tlCalls.empty()) return kInvalidConfiguration;
  CallConfig c = tlCalls.back();
  tlCalls.pop_back();
  *g = c.grid;
  *b = c.block;
  *smem = c.smem;
  *(void**)stream = c.stream;
  return kSuccess;
}

// --- launches. A cudaKernel_t is the host stub's address.
int __cudaGetKernel(void** kernel, const void* func) {
  *kernel = (void*)func;
  return kSuccess;
}
int cudaGetKernel(void** kernel, const void* func) {
  *kernel = (void*)func;
  return kSuccess;
}
int cudaGetFuncBySymbol(void** f, const void* sym) {
  *f = (void*)sym;
  return kSuccess;
}
int cudaLaunchKernel(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return launchHost(func, g, b, args, smem, s);
}
int cudaLaunchKernel_ptsz(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return launchHost(func, g, b, args, smem, s);
}
int __cudaLaunchKernel(void* k, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return launchHost(k, g, b, args, smem, s);
}
int __cudaLaunchKernel_ptsz(void* k, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return launchHost(k, g, b, args, smem, s);
}
int cudaLaunchKernelExC(const AbiLaunchConfig* c, const void* func, void** args) {
  return launchHost(func, c->grid, c->block, args, c->dynamicSmem, c->stream, c);
}
int cudaLaunchKernelExC_ptsz(const AbiLaunchConfig* c, const void* func, void** args) {
  return cudaLaunchKernelExC(c, func, args);
}
int cudaLaunchCooperativeKernel(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return launchHost(func, g, b, args, smem, s, nullptr, true);
}
int cudaLaunchCooperativeKernel_ptsz(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* s) {
  return cudaLaunchCooperativeKernel(func, g, b, args, smem, s);
}
int cudaLaunchHostFunc(void*, void (*fn)(void*), void* arg) {
  fn(arg);
  return kSuccess;
}

int cudaFuncSetAttribute(const void* func, int attr, int value) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f = findFunction(func);
  if (!f) return fail(kInvalidDeviceFunction);
  if (attr == 8) {
    if (value < 0 || value > (int)maxShared()) return fail(kInvalidValue);
    f->maxDynamic = value;
  } else if (attr == 14) {
    f->nonPortable = value != 0;
  }
  return kSuccess;
}
int cudaFuncGetAttributes(AbiFuncAttributes* a, const void* func) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f = findFunction(func);
  if (!f) return fail(kInvalidDeviceFunction);
  try {
    Kernel* k = kernelOf(*f);
    if (!k) return fail(kInvalidDeviceFunction);
    memset(a, 0, sizeof *a);
    a->sharedSizeBytes = k->staticShared - kSharedBase;
    a->localSizeBytes = k->localBytes - kLocalBase;
    a->maxThreadsPerBlock = k->fn->maxThreads ? k->fn->maxThreads : 1024;
    a->numRegs = 128;
    a->ptxVersion = atoi(k->module->ptx->target.c_str() + strlen("sm_"));  // of the embedded PTX; CUB tunes by it
    a->binaryVersion = config().arch;
    a->maxDynamicSharedSizeBytes = f->maxDynamic;
    a->preferredShmemCarveout = -1;
    a->requiredClusterWidth = k->fn->reqCluster[0];
    a->requiredClusterHeight = k->fn->reqCluster[1];
    a->requiredClusterDepth = k->fn->reqCluster[2];
    a->clusterDimMustBeSet = k->fn->reqCluster[0] != 0;
  } catch (Fault& e) {
    reportFault(e);
    return e.code;
  }
  return kSuccess;
}
int cudaFuncSetCacheConfig(const void*, int) {
  return kSuccess;
}
int cudaFuncSetSharedMemConfig(const void*, int) {
  return kSuccess;
}
int cudaFuncGetName(const char** name, const void* func) {
  HostFunction* f = findFunction(func);
  if (!f) return fail(kInvalidDeviceFunction);
  *name = f->name.c_str();
  return kSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* func, int threads, size_t smem,
                                                           unsigned) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f = findFunction(func);
  if (!f) return fail(kInvalidDeviceFunction);
  try {
    Kernel* k = kernelOf(*f);
    if (!k) return fail(kInvalidDeviceFunction);
    *n = occupancy(*f, *k, threads, smem);
  } catch (Fault& e) {
    reportFault(e);
    return e.code;
  }
  return kSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* func, int threads, size_t smem) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, func, threads, smem, 0);
}
int cudaOccupancyMaxActiveClusters(int* n, const void* func, const AbiLaunchConfig* c) {
  int per = 0;
  int e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per, func, (int)(c->block.x * c->block.y * c->block.z),
                                                        c->dynamicSmem);
  if (e) return e;
  unsigned size = 1;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == 4)
      size = c->attrs[i].val.cluster[0] * c->attrs[i].val.cluster[1] * c->attrs[i].val.cluster[2];
  *n = (int)(132 * per / std::max(1u, size));
  return kSuccess;
}
int cudaOccupancyMaxPotentialClusterSize(int* n, const void*, const AbiLaunchConfig*) {
  *n = 8;
  return kSuccess;
}
int cudaOccupancyAvailableDynamicSMemPerBlock(size_t* n, const void*, int blocks, int) {
  *n = maxShared() / (blocks ? blocks : 1);
  return kSuccess;
}

// --- memory
int cudaMalloc(void** p, size_t n) {
  if (int e = refuseInCapture()) return e;
  programAllocates();
  *p = n ? deviceAlloc(n) : nullptr;
  return n && !*p ? fail(kMemoryAllocation) : kSuccess;
}
int cudaMallocAsync(void** p, size_t n, void*) {
  return cudaMalloc(p, n);
}
int cudaMallocAsync_ptsz(void** p, size_t n, void*) {
  return cudaMalloc(p, n);
}
int cudaMallocFromPoolAsync(void** p, size_t n, void*, void*) {
  return cudaMalloc(p, n);
}
int cudaMallocManaged(void** p, size_t n, unsigned) {
  return cudaMalloc(p, n);
}
int cudaMallocHost(void** p, size_t n) {
  return cudaMalloc(p, n);
}
int cudaHostAlloc(void** p, size_t n, unsigned) {
  return cudaMalloc(p, n);
}
int cudaMallocPitch(void** p, size_t* pitch, size_t w, size_t h) {
  *pitch = (w + 511) / 512 * 512;
  return cudaMalloc(p, *pitch * h);
}
int cudaFree(void* p) {
  return !p || deviceFree(p) ? kSuccess : fail(kInvalidValue);
}
int cudaFreeAsync(void* p, void*) {
  return cudaFree(p);
}
int cudaFreeAsync_ptsz(void* p, void*) {
  return cudaFree(p);
}
int cudaFreeHost(void* p) {
  return cudaFree(p);
}
int cudaHostRegister(void* p, size_t n, unsigned) {
  registerRange(p, n, "cudaHostRegister", false);
  return kSuccess;
}
int cudaHostUnregister(void* p) {
  unregisterRange(p);
  return kSuccess;
}
int cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  *d = h;
  return kSuccess;
}
int cudaHostGetFlags(unsigned* f, void*) {
  *f = 0;
  return kSuccess;
}
int cudaMemGetInfo(size_t* freeB, size_t* total) {
  *total = (size_t)80 << 30;
  *freeB = *total - allocatedBytes();
  return kSuccess;
}
static int copyNow(void* d, const void* s, size_t n) {
  if (g_pendingFault) return fail(g_pendingFault);
  if (n) memmove(d, s, n);
  return kSuccess;
}
int cudaMemcpy(void* d, const void* s, size_t n, int) {
  if (int e = refuseInCapture()) return e;
  return copyNow(d, s, n);
}
int cudaMemcpyAsync(void* d, const void* s, size_t n, int, void* st) {
  return onStream(st, [=] { return copyNow(d, s, n); });
}
int cudaMemcpy_ptds(void* d, const void* s, size_t n, int k) {
  return cudaMemcpy(d, s, n, k);
}
int cudaMemcpyAsync_ptsz(void* d, const void* s, size_t n, int k, void* st) {
  return cudaMemcpyAsync(d, s, n, k, st);
}
int cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) {
  return cudaMemcpy(d, s, n, 4);
}
int cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, void*) {
  return cudaMemcpy(d, s, n, 4);
}
int cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, int) {
  return copy2D(d, dp, s, sp, w, h);
}
int cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, int, void* st) {
  return onStream(st, [=] { return copy2D(d, dp, s, sp, w, h); });
}
int cudaMemset(void* d, int v, size_t n) {
  if (n) memset(d, v, n);
  return kSuccess;
}
int cudaMemsetAsync(void* d, int v, size_t n, void* st) {
  return onStream(st, [=] { return cudaMemset(d, v, n); });
}
int cudaMemset_ptds(void* d, int v, size_t n) {
  return cudaMemset(d, v, n);
}
int cudaMemsetAsync_ptsz(void* d, int v, size_t n, void* st) {
  return cudaMemsetAsync(d, v, n, st);
}
int cudaMemset2D(void* d, size_t p, int v, size_t w, size_t h) {
  for (size_t i = 0; i < h; i++) memset((char*)d + i * p, v, w);
  return kSuccess;
}
int cudaMemset2DAsync(void* d, size_t p, int v, size_t w, size_t h, void*) {
  return cudaMemset2D(d, p, v, w, h);
}
int cudaMemAdvise(const void*, size_t, int, int) {
  return kSuccess;
}
int cudaMemPrefetchAsync(const void*, size_t, int, unsigned, void*) {
  return kSuccess;
}
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
int cudaPointerGetAttributes(AbiPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  RangeInfo r;
  bool known = findRange((uint64_t)p, r);
  a->type = known ? 2 : 0;
  a->device = known ? 0 : -2;
  a->devicePointer = known ? (void*)p : nullptr;
  a->hostPointer = known ? nullptr : (void*)p;
  return kSuccess;
}

// --- errors
int cudaGetLastError() {
  int e = tlLastError ? tlLastError : g_pendingFault;
  tlLastError = 0;
  g_pendingFault = 0;
  return e;
}
int cudaPeekAtLastError() {
  return tlLastError ? tlLastError : g_pendingFault;
}
const char* cudaGetErrorString(int e) {
  auto it = errorTable().find(e);
  return it == errorTable().end() ? "unrecognized error code" : it->second.second;
}
const char* cudaGetErrorName(int e) {
  auto it = errorTable().find(e);
  return it == errorTable().end() ? "unrecognized error code" : it->second.first;
}

}  // extern "C"
