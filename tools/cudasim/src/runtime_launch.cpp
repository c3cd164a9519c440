// Launches: their configuration, limits and entry points, and the limits that a program may ask for.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime_registry.h"
#include "stream_capture.h"

namespace cudasim {

namespace {

struct CallConfig {
  dim3 grid, block;
  size_t smem;
  void* stream;
};
thread_local std::vector<CallConfig> tlCalls;

}  // namespace

static int staticShared(const Kernel& k) {
  return (int)(k.staticShared - kSharedBase);
}
static int dynamicLimit(const HostFunction& f, const Kernel& k) {
  return f.maxDynamic >= 0 ? f.maxDynamic : 48 * 1024 - staticShared(k);
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
  if (staticShared(k) + c.dynamicShared > limits().sharedPerBlock)
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

// The kernel of a host stub; an error where there is none.
int findKernel(const void* func, HostFunction*& f, Kernel*& k) {
  f = findFunction(func);
  try {
    k = f ? kernelOf(*f) : nullptr;
  } catch (Fault& e) {
    reportFault(e);
    return e.code;
  }
  return k ? kSuccess : fail(kInvalidDeviceFunction);
}

int launchHost(const void* func, dim3 g, dim3 b, void** args, size_t smem, void* stream,
               const AbiLaunchConfig* ex = nullptr, bool cooperative = false) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f;
  Kernel* k;
  if (int error = findKernel(func, f, k)) return error;
  LaunchConfig c = makeConfig(*k, g, b, smem);
  c.cooperative = cooperative;
  for (unsigned i = 0; ex && i < ex->numAttrs; i++) {
    const AbiLaunchAttribute& a = ex->attrs[i];
    if (a.id == 2) c.cooperative = a.val.i != 0;
    if (a.id == 4)
      for (int j = 0; j < 3; j++) c.cluster[j] = std::max(1u, a.val.cluster[j]);
  }
  const int maxDynamic = dynamicLimit(*f, *k);
  if (!capturing(stream)) return launchKernel(*k, c, args, maxDynamic, f->nonPortable);
  std::vector<std::vector<uint8_t>> values;  // arguments are taken when the launch is captured
  for (size_t i = 0; i < k->params.size(); i++)
    values.emplace_back((uint8_t*)args[i], (uint8_t*)args[i] + k->params[i].size);
  const bool nonPortable = f->nonPortable;
  return onStream(stream, [=]() mutable {
    std::vector<void*> p;
    for (auto& v : values) p.push_back(v.data());
    return launchKernel(*k, c, p.data(), maxDynamic, nonPortable);
  });
}

int occupancy(const HostFunction& f, Kernel& k, int threads, size_t dyn) {
  if (threads <= 0 || threads > 1024) return 0;
  const DeviceLimits& d = limits();
  const int warps = (threads + 31) / 32;
  const size_t smem = staticShared(k) + dyn;
  if ((int)dyn > dynamicLimit(f, k) || smem > d.sharedPerBlock) return 0;
  return (int)std::min<size_t>({d.threadsPerSm / (warps * 32u), d.blocksPerSm, d.sharedPerSm / (smem + 1024)});
}

}  // namespace
}  // namespace cudasim

using namespace cudasim;

extern "C" {

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
    const Kernel* k = kernelOf(*f);
    if (!k) return fail(kInvalidDeviceFunction);
    if (value < 0 || value + staticShared(*k) > (int)limits().sharedPerBlock) return fail(kInvalidValue);
    f->maxDynamic = value;
  } else if (attr == 14) {
    f->nonPortable = value != 0;
  }
  return kSuccess;
}
int cudaFuncGetAttributes(AbiFuncAttributes* a, const void* func) {
  std::lock_guard<std::recursive_mutex> lock(state().mutex);
  HostFunction* f;
  Kernel* k;
  if (int error = findKernel(func, f, k)) return error;
  memset(a, 0, sizeof *a);
  a->sharedSizeBytes = staticShared(*k);
  a->localSizeBytes = k->localBytes - kLocalBase;
  a->maxThreadsPerBlock = k->fn->maxThreads ? k->fn->maxThreads : 1024;
  a->numRegs = 128;
  a->ptxVersion = atoi(k->module->ptx->target.c_str() + strlen("sm_"));  // of the embedded PTX; CUB tunes by it
  a->binaryVersion = config().arch;
  a->maxDynamicSharedSizeBytes = dynamicLimit(*f, *k);
  a->preferredShmemCarveout = -1;
  a->requiredClusterWidth = k->fn->reqCluster[0];
  a->requiredClusterHeight = k->fn->reqCluster[1];
  a->requiredClusterDepth = k->fn->reqCluster[2];
  a->clusterDimMustBeSet = k->fn->reqCluster[0] != 0;
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
  HostFunction* f;
  Kernel* k;
  if (int error = findKernel(func, f, k)) return error;
  *n = occupancy(*f, *k, threads, smem);
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
  *n = (int)(multiprocessors() * per / std::max(1u, size));
  return kSuccess;
}
int cudaOccupancyMaxPotentialClusterSize(int* n, const void*, const AbiLaunchConfig*) {
  *n = 8;
  return kSuccess;
}
int cudaOccupancyAvailableDynamicSMemPerBlock(size_t* n, const void*, int blocks, int) {
  *n = limits().sharedPerBlock / (blocks ? blocks : 1);
  return kSuccess;
}

}  // extern "C"
