// Memory: allocation, copies and sets.
#include <cstring>

#include "memory.h"
#include "runtime.h"
#include "stream_capture.h"

namespace cudasim {

namespace {

int copy2D(void* dst, size_t dp, const void* src, size_t sp, size_t width, size_t height) {
  if (width > dp || width > sp) return fail(kInvalidValue);
  for (size_t i = 0; i < height; i++) memmove((char*)dst + i * dp, (const char*)src + i * sp, width);
  return kSuccess;
}

}  // namespace
}  // namespace cudasim

using namespace cudasim;

extern "C" {

static int allocate(void** p, size_t n) {
  if (int e = refuseInCapture()) return e;
  *p = n ? deviceAlloc(n) : nullptr;
  return n && !*p ? fail(kMemoryAllocation) : kSuccess;
}
int cudaMalloc(void** p, size_t n) {
  programAllocates();
  return allocate(p, n);
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
  return allocate(p, n);
}
int cudaHostAlloc(void** p, size_t n, unsigned) {
  return allocate(p, n);
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

}  // extern "C"
