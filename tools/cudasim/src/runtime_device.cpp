// The CUDA runtime entry points for devices, streams and events, and the few
// driver functions that cudaGetDriverEntryPoint hands out.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "memory.h"
#include "runtime.h"
#include "stream_capture.h"
#include "tensor_map.h"

namespace cudasim {
namespace {

struct HostEvent {
  std::chrono::steady_clock::time_point t;
  bool recorded = false;
};

// Driver entry points handed out by cudaGetDriverEntryPoint.
extern "C" int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* addr, const uint64_t* dim,
                                      const uint64_t* strides, const uint32_t* box, const uint32_t* es, int interleave,
                                      int swizzle, int l2, int oob) {
  return encodeTensorMap(map, type, rank, addr, dim, strides, box, es, interleave, swizzle, l2, oob);
}
extern "C" int cuTensorMapReplaceAddress(void* map, void* addr) {
  ((TensorMap*)map)->address = (uint64_t)addr;
  return 0;
}
extern "C" int cuGetErrorString(int code, const char** s) {
  *s = code == 0 ? "no error" : code == 1 ? "invalid argument" : "unknown error";
  return 0;
}
extern "C" int cuGetErrorName(int code, const char** s) {
  *s = code == 0 ? "CUDA_SUCCESS" : code == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
extern "C" int cuInit(unsigned) {
  return 0;
}
extern "C" int cuDriverGetVersion(int* v) {
  *v = 13000;
  return 0;
}
extern "C" int cuMemsetD8Async(uint64_t p, unsigned char v, size_t n, void*) {
  memset((void*)p, v, n);
  return 0;
}
extern "C" int cuMemsetD16Async(uint64_t p, unsigned short v, size_t n, void*) {
  std::fill_n((unsigned short*)p, n, v);
  return 0;
}
extern "C" int cuMemsetD32Async(uint64_t p, unsigned v, size_t n, void*) {
  std::fill_n((unsigned*)p, n, v);
  return 0;
}

void* driverEntry(const char* name) {
  static const std::map<std::string, void*> t = {{"cuTensorMapEncodeTiled", (void*)cuTensorMapEncodeTiled},
                                                 {"cuTensorMapReplaceAddress", (void*)cuTensorMapReplaceAddress},
                                                 {"cuGetErrorString", (void*)cuGetErrorString},
                                                 {"cuGetErrorName", (void*)cuGetErrorName},
                                                 {"cuInit", (void*)cuInit},
                                                 {"cuDriverGetVersion", (void*)cuDriverGetVersion},
                                                 {"cuMemsetD8Async", (void*)cuMemsetD8Async},
                                                 {"cuMemsetD16Async", (void*)cuMemsetD16Async},
                                                 {"cuMemsetD32Async", (void*)cuMemsetD32Async}};
  auto it = t.find(name);
  return it == t.end() ? nullptr : it->second;
}

}  // namespace

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors of one product each.
const DeviceLimits& limits() {
  constexpr uint32_t KiB = 1024;
  static const DeviceLimits ampere{163 * KiB, 164 * KiB, 2048, 32, 108}, hopper{227 * KiB, 228 * KiB, 2048, 32, 132},
      ga102{99 * KiB, 100 * KiB, 1536, 16, 84}, ada{99 * KiB, 100 * KiB, 1536, 24, 128},
      blackwell{227 * KiB, 228 * KiB, 2048, 32, 148}, gb202{99 * KiB, 100 * KiB, 1536, 24, 170};
  const int arch = config().arch;
  return arch >= 120   ? gb202
         : arch >= 100 ? blackwell
         : arch >= 90  ? hopper
         : arch == 89  ? ada
         : arch > 80   ? ga102
                       : ampere;
}
int multiprocessors() {
  return config().multiprocessors > 0 ? config().multiprocessors : (int)limits().multiprocessors;
}
}  // namespace cudasim

using namespace cudasim;

extern "C" {

// --- devices
int cudaGetDeviceCount(int* n) {
  *n = 1;
  return kSuccess;
}
int cudaGetDevice(int* d) {
  *d = 0;
  return kSuccess;
}
int cudaSetDevice(int d) {
  return d == 0 ? kSuccess : fail(kInvalidDevice);
}
int cudaInitDevice(int, unsigned, unsigned) {
  return kSuccess;
}
int cudaSetDeviceFlags(unsigned) {
  return kSuccess;
}
int cudaGetDeviceFlags(unsigned* f) {
  *f = 0;
  return kSuccess;
}
int cudaChooseDevice(int* d, const void*) {
  *d = 0;
  return kSuccess;
}
int cudaDeviceReset() {
  g_pendingFault = 0;
  tlLastError = 0;
  return kSuccess;
}
int cudaDeviceSynchronize() {
  if (int e = refuseInCapture()) return e;
  return g_pendingFault ? fail(g_pendingFault) : kSuccess;
}
int cudaDeviceGetLimit(size_t* v, int) {
  *v = 8 << 20;
  return kSuccess;
}
int cudaDeviceSetLimit(int, size_t) {
  return kSuccess;
}
int cudaDeviceSetCacheConfig(int) {
  return kSuccess;
}
int cudaDeviceGetCacheConfig(int* c) {
  *c = 0;
  return kSuccess;
}
int cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return kSuccess;
}
int cudaDeviceGetStreamPriorityRange(int* lo, int* hi) {
  *lo = 0;
  *hi = -5;
  return kSuccess;
}
int cudaDeviceGetDefaultMemPool(void** p, int) {
  *p = (void*)1;
  return kSuccess;
}
int cudaDeviceGetMemPool(void** p, int) {
  *p = (void*)1;
  return kSuccess;
}
int cudaMemPoolSetAttribute(void*, int, void*) {
  return kSuccess;
}
int cudaMemPoolTrimTo(void*, size_t) {
  return kSuccess;
}
int cudaDriverGetVersion(int* v) {
  *v = 13000;
  return kSuccess;
}
int cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return kSuccess;
}
int cudaGetDeviceProperties(AbiDeviceProp* p, int d) {
  if (d) return fail(kInvalidDevice);
  const bool hopper = config().arch >= 90;
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "cudasim sm_%d", config().arch);
  p->totalGlobalMem = (size_t)80 << 30;
  p->sharedMemPerBlock = 48 * 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 0x7fffffff;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = config().arch / 10;
  p->minor = config().arch % 10;
  p->textureAlignment = p->surfaceAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = multiprocessors();
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = (hopper ? 50 : 40) << 20;
  p->maxThreadsPerMultiProcessor = (int)limits().threadsPerSm;
  p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = limits().sharedPerSm;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = limits().sharedPerBlock;
  p->maxBlocksPerMultiProcessor = (int)limits().blocksPerSm;
  p->reservedSharedMemPerBlock = 1024;
  p->memoryPoolsSupported = 1;
  p->clusterLaunch = hopper;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* v, int attr, int d) {
  if (d) return fail(kInvalidDevice);
  const bool hopper = config().arch >= 90;
  switch (attr) {
    case 1:
    case 2:
    case 3: *v = 1024; break;
    case 4: *v = 64; break;
    case 5: *v = 0x7fffffff; break;
    case 6:
    case 7: *v = 65535; break;
    case 8: *v = 48 * 1024; break;
    case 9: *v = 65536; break;
    case 10: *v = 32; break;
    case 11: *v = 0x7fffffff; break;
    case 12:
    case 82: *v = 65536; break;
    case 13: *v = 1755000; break;
    case 14: *v = 512; break;
    case 15:
    case 19:
    case 31:
    case 41:
    case 78:
    case 79:
    case 80:
    case 83:
    case 95:
    case 99:
    case 115: *v = 1; break;
    case 16: *v = multiprocessors(); break;
    case 36: *v = 2619000; break;
    case 37: *v = 5120; break;
    case 38: *v = (hopper ? 50 : 40) << 20; break;
    case 39: *v = (int)limits().threadsPerSm; break;
    case 40: *v = 3; break;
    case 75: *v = config().arch / 10; break;
    case 76: *v = config().arch % 10; break;
    case 81: *v = (int)limits().sharedPerSm; break;
    case 97: *v = (int)limits().sharedPerBlock; break;
    case 106: *v = (int)limits().blocksPerSm; break;
    case 111: *v = 1024; break;
    case 120: *v = hopper; break;
    default: *v = 0;
  }
  return kSuccess;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** fn, unsigned, unsigned long long, int* status) {
  *fn = driverEntry(name);
  if (status) *status = *fn ? 0 : 1;
  return kSuccess;
}
int cudaGetDriverEntryPointByVersion_ptsz(const char* n, void** f, unsigned v, unsigned long long fl, int* s) {
  return cudaGetDriverEntryPointByVersion(n, f, v, fl, s);
}
int cudaGetDriverEntryPoint(const char* n, void** f, unsigned long long fl, int* s) {
  return cudaGetDriverEntryPointByVersion(n, f, 0, fl, s);
}
int cudaGetDriverEntryPoint_ptsz(const char* n, void** f, unsigned long long fl, int* s) {
  return cudaGetDriverEntryPointByVersion(n, f, 0, fl, s);
}

// --- streams and events; everything runs at once
int cudaStreamCreate(void** s) {
  *s = malloc(16);
  return kSuccess;
}
int cudaStreamCreateWithFlags(void** s, unsigned) {
  return cudaStreamCreate(s);
}
int cudaStreamCreateWithPriority(void** s, unsigned, int) {
  return cudaStreamCreate(s);
}
int cudaStreamDestroy(void* s) {
  free(s);
  return kSuccess;
}
int cudaStreamSynchronize(void*) {
  return cudaDeviceSynchronize();
}
int cudaStreamSynchronize_ptsz(void*) {
  return cudaDeviceSynchronize();
}
int cudaStreamQuery(void*) {
  return cudaDeviceSynchronize();
}
int cudaStreamWaitEvent(void* s, void* e, unsigned) {
  captureWait(s, e);
  return kSuccess;
}
int cudaStreamWaitEvent_ptsz(void* s, void* e, unsigned) {
  captureWait(s, e);
  return kSuccess;
}
int cudaStreamGetDevice(void*, int* d) {
  *d = 0;
  return kSuccess;
}
int cudaStreamGetFlags(void*, unsigned* f) {
  *f = 0;
  return kSuccess;
}
int cudaStreamGetPriority(void*, int* p) {
  *p = 0;
  return kSuccess;
}
int cudaStreamSetAttribute(void*, int, const void*) {
  return kSuccess;
}
int cudaStreamAddCallback(void* s, void (*cb)(void*, int, void*), void* data, unsigned) {
  cb(s, 0, data);
  return kSuccess;
}
int cudaEventCreate(void** e) {
  *e = new HostEvent;
  return kSuccess;
}
int cudaEventCreateWithFlags(void** e, unsigned) {
  return cudaEventCreate(e);
}
int cudaEventDestroy(void* e) {
  delete (HostEvent*)e;
  return kSuccess;
}
int cudaEventRecord(void* e, void* s) {
  captureEvent(e, s);
  ((HostEvent*)e)->t = std::chrono::steady_clock::now();
  ((HostEvent*)e)->recorded = true;
  return kSuccess;
}
int cudaEventRecordWithFlags(void* e, void* s, unsigned) {
  return cudaEventRecord(e, s);
}
int cudaEventRecord_ptsz(void* e, void* s) {
  return cudaEventRecord(e, s);
}
int cudaEventQuery(void*) {
  return kSuccess;
}
int cudaEventSynchronize(void*) {
  return cudaDeviceSynchronize();
}
int cudaEventElapsedTime(float* ms, void* a, void* b) {
  auto *x = (HostEvent*)a, *y = (HostEvent*)b;
  if (!x->recorded || !y->recorded) return fail(kInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(y->t - x->t).count();
  return kSuccess;
}
int cudaProfilerStart() {
  return kSuccess;
}
int cudaProfilerStop() {
  return kSuccess;
}

}  // extern "C"
