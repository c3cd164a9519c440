// Kernels for test_basic.py.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdio>
namespace cg = cooperative_groups;

__global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
__global__ void block_sum(const float* a, float* out, int n) {
  __shared__ float part[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += a[i];
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) atomicAdd(out, v);
  }
}
__global__ void histogram(const int* a, int n, unsigned* h) {
  __shared__ unsigned s[64];
  for (int i = threadIdx.x; i < 64; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[a[i] & 63], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 64; i += blockDim.x) atomicAdd(&h[i], s[i]);
}
__global__ void atomics(int* i, unsigned* u, float* f, double* d, __half2* h, __nv_bfloat162* b,
                        unsigned long long* l) {
  int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicMax(&i[0], t);
  atomicMin(&i[1], -t);
  atomicExch(&i[2], 7);
  atomicCAS(&i[3], t, t + 1);
  atomicXor(&i[4], t);
  atomicInc(&u[0], 9);
  atomicDec(&u[1], 5);
  atomicAnd(&u[2], ~(1u << (t & 31)));
  atomicOr(&u[3], 1u << (t & 31));
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  atomicAdd(b, __floats2bfloat162_rn(1.f, 0.5f));
  atomicAdd(l, 1ull << 33);
}
__global__ void divergent(int* out, const int* in, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int x = in[i], steps = 0;
  while (x != 1) {  // Collatz
    if (x & 1)
      x = 3 * x + 1;
    else
      x >>= 1;
    if (++steps > 500) break;
  }
  switch (i % 7) {
    case 0: steps += 1000; break;
    case 1: steps *= 3; break;
    case 2: steps ^= 0x55; break;
    case 3:
      for (int k = 0; k < i % 13; k++) steps += k;
      break;
    case 4: steps = -steps; break;
    case 5:
      if (steps > 20)
        steps -= 20;
      else
        steps += 5;
      break;
    default: break;
  }
  out[i] = steps + __popc(__activemask()) * 0;
}
// Lanes of one warp hand a value on through a spin lock; needs independent thread scheduling.
__global__ void warp_lock(int* lock, int* value) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *(volatile int*)value = *(volatile int*)value + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
__global__ void local_array(const int* in, int* out, int n) {
  int a[40];
  int i = threadIdx.x;
  for (int k = 0; k < 40; k++) a[k] = in[(i * 7 + k) % n];
  for (int k = 0; k < 39; k++)
    for (int j = 0; j < 39 - k; j++)
      if (a[j] > a[j + 1]) {
        int t = a[j];
        a[j] = a[j + 1];
        a[j + 1] = t;
      }
  out[i] = a[in[i] % 40];
}
struct Pair {
  double x;
  int y;
};
__device__ __noinline__ Pair combine(Pair a, Pair b, float s) {
  return {a.x * s + b.x, a.y - b.y};
}
__device__ __noinline__ int twice(int v) {
  return 2 * v;
}
__device__ __noinline__ int square(int v) {
  return v * v;
}
typedef int (*Fn)(int);
__device__ Fn table[2] = {twice, square};
__global__ void calls(const int* in, double* out, int* out2) {
  int i = threadIdx.x;
  Pair p{(double)in[i], i};
  if (i & 1)
    p = combine(p, {1.5, in[i]}, 2.f);
  else
    p = combine({0.25, 3}, p, 0.5f);
  out[i] = p.x + p.y;
  out2[i] = table[in[i] & 1](i);
}
__global__ void prints(int n) {
  if (threadIdx.x == 3) printf("value %d %5.2f %s %llx%%\n", n, 1.25, "text", 0x123456789abcull);
}
__global__ void asserts(int n) {
  assert(n < 5);
}
__global__ void traps() {
  __trap();
}
__global__ void barriers(int* out) {
  __shared__ int s[2][64];
  int w = threadIdx.x / 64, l = threadIdx.x % 64;
  s[w][l] = threadIdx.x;
  asm volatile("bar.sync %0, 64;" ::"r"(w + 1) : "memory");
  out[threadIdx.x] = s[w][63 - l];
  out[128 + threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);
  out[256 + threadIdx.x] = __syncthreads_or(threadIdx.x == 77) + 2 * __syncthreads_and(threadIdx.x < 128);
}
__global__ void collectives(int* out) {
  int l = threadIdx.x;
  out[l] = __ballot_sync(~0u, l % 3 == 0);
  out[32 + l] = __match_any_sync(~0u, l / 5);
  out[64 + l] = __reduce_add_sync(~0u, l);
  out[96 + l] = __shfl_sync(~0u, l * l, (l + 3) & 31);
  if (l < 16)
    out[128 + l] = __shfl_up_sync(0xffff, l, 1, 8) + __any_sync(0xffff, l == 15);
  else
    out[128 + l] = __shfl_xor_sync(0xffff0000, l, 5) + 100 * __all_sync(0xffff0000, l > 15);
  __syncwarp();
  out[160 + l] = __reduce_max_sync(~0u, (l * 13) % 32);
}
__global__ void half_math(const __half2* a, const __half2* b, __half2* o, const __nv_bfloat162* x,
                          const __nv_bfloat162* y, __nv_bfloat162* p, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __hmax2(__hfma2(a[i], b[i], __hsub2(a[i], b[i])), __hneg2(b[i]));
  p[i] = __hmin2(__hfma2(x[i], y[i], __hadd2(x[i], y[i])), __habs2(x[i]));
}
__constant__ int ctable[16] = {1, 2, 3, 5, 8, 13, 21, 34, 55, 89};
__device__ int counter = 5;
__global__ void symbols(int* out) {
  out[threadIdx.x] = ctable[threadIdx.x % 16] + atomicAdd(&counter, 1) * 0;
}
__global__ void wide(const float4* a, double2* b, short4* s, unsigned char* c) {
  int i = threadIdx.x;
  float4 v = a[i];
  b[i] = {(double)v.x + v.y, (double)v.z * v.w};
  s[i] = {(short)v.x, (short)v.y, (short)v.z, (short)v.w};
  c[i] = (unsigned char)(int)v.x;
}
__global__ void grid_barrier(int* data, int n) {
  cg::grid_group g = cg::this_grid();
  int i = g.thread_rank();
  data[i] = i;
  g.sync();
  int v = data[(i + 97) % n];
  g.sync();
  data[i] = v;
}
__global__ void wait_for_later_block(volatile int* flag, int* out) {  // block 0 spins on the last block
  if (blockIdx.x == 0) {
    while (!*flag) {
    }
    out[0] = *flag;
  } else if (blockIdx.x == gridDim.x - 1) {
    __threadfence();
    *flag = 42;
  }
}
__global__ void hang(int* p) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    while (*(volatile int*)p != 77) {
    }
}
__global__ void hang_barrier() {
  asm volatile("bar.sync 1, 64;");
}
__global__ void big_switch(const int* in, int* out) {
  int r;
  switch (in[threadIdx.x]) {
    case 0: r = 10; break;
    case 1: r = 77; break;
    case 2: r = 5; break;
    case 3: r = 123; break;
    case 4: r = -4; break;
    case 5: r = 65; break;
    case 6: r = 9; break;
    case 7: r = 1; break;
    case 8: r = 33; break;
    case 9: r = 2; break;
    default: r = -1;
  }
  asm volatile("{ .reg .pred p; setp.gt.s32 p, %1, 4; @p bra L1; add.s32 %0, %0, 1000; L1: }"
               : "+r"(r)
               : "r"(in[threadIdx.x]));
  out[threadIdx.x] = r;
}
template <int K>
__global__ void spmv_like(const float* a, float* o) {
  float acc = 0;
#pragma unroll
  for (int k = 0; k < K; k++) acc = fmaf(a[(threadIdx.x * K + k) % 1024], sinf(k * 0.1f), acc);
  o[threadIdx.x] = acc;
}

#define L(NAME, ...) NAME<<<__VA_ARGS__>>>
extern "C" {
int l_vadd(const float* a, const float* b, float* c, int n) {
  vadd<<<(n + 255) / 256, 256>>>(a, b, c, n);
  return cudaGetLastError();
}
int l_sum(const float* a, float* o, int n) {
  block_sum<<<8, 256>>>(a, o, n);
  return cudaDeviceSynchronize();
}
int l_hist(const int* a, int n, unsigned* h) {
  histogram<<<4, 128>>>(a, n, h);
  return cudaDeviceSynchronize();
}
int l_atomics(int* i, unsigned* u, float* f, double* d, void* h, void* b, unsigned long long* l) {
  atomics<<<2, 64>>>(i, u, f, d, (__half2*)h, (__nv_bfloat162*)b, l);
  return cudaDeviceSynchronize();
}
int l_divergent(int* o, const int* i, int n) {
  divergent<<<(n + 127) / 128, 128>>>(o, i, n);
  return cudaDeviceSynchronize();
}
int l_lock(int* lock, int* v) {
  warp_lock<<<2, 96>>>(lock, v);
  return cudaDeviceSynchronize();
}
int l_local(const int* i, int* o, int n) {
  local_array<<<1, 64>>>(i, o, n);
  return cudaDeviceSynchronize();
}
int l_calls(const int* i, double* o, int* o2) {
  calls<<<1, 64>>>(i, o, o2);
  return cudaDeviceSynchronize();
}
int l_prints(int n) {
  prints<<<1, 32>>>(n);
  return cudaDeviceSynchronize();
}
int l_asserts(int n) {
  asserts<<<1, 32>>>(n);
  return cudaDeviceSynchronize();
}
int l_traps() {
  traps<<<1, 32>>>();
  return cudaDeviceSynchronize();
}
int l_barriers(int* o) {
  barriers<<<1, 128>>>(o);
  return cudaDeviceSynchronize();
}
int l_collectives(int* o) {
  collectives<<<1, 32>>>(o);
  return cudaDeviceSynchronize();
}
int l_half(void* a, void* b, void* o, void* x, void* y, void* p, int n) {
  half_math<<<(n + 127) / 128, 128>>>((__half2*)a, (__half2*)b, (__half2*)o, (__nv_bfloat162*)x, (__nv_bfloat162*)y,
                                      (__nv_bfloat162*)p, n);
  return cudaDeviceSynchronize();
}
int l_symbols(int* o, int set, int* count) {
  if (set) {
    int v = 1000;
    if (int e = cudaMemcpyToSymbol(ctable, &v, 4, 8)) return e;
  }
  symbols<<<1, 32>>>(o);
  return cudaMemcpyFromSymbol(count, counter, 4);
}
int l_wide(const void* a, void* b, void* s, void* c) {
  wide<<<1, 32>>>((float4*)a, (double2*)b, (short4*)s, (unsigned char*)c);
  return cudaDeviceSynchronize();
}
int l_grid(int* d) {
  int n = 4 * 64;
  void* args[] = {&d, &n};
  if (int e = cudaLaunchCooperativeKernel((void*)grid_barrier, dim3(4), dim3(64), args, 0, 0)) return e;
  return cudaDeviceSynchronize();
}
int l_later(int* f, int* o) {
  wait_for_later_block<<<6, 32>>>(f, o);
  return cudaDeviceSynchronize();
}
int l_hang(int* p) {
  hang<<<1, 64>>>(p);
  return cudaDeviceSynchronize();
}
int l_hang_barrier() {
  hang_barrier<<<2, 32>>>();
  return cudaDeviceSynchronize();
}
int l_switch(const int* i, int* o) {
  big_switch<<<1, 32>>>(i, o);
  return cudaDeviceSynchronize();
}
int l_spmv(const float* a, float* o, int blocks) {
  spmv_like<64><<<blocks, 256>>>(a, o);
  return cudaDeviceSynchronize();
}
int l_props(int* v) {
  cudaDeviceProp p;
  if (int e = cudaGetDeviceProperties(&p, 0)) return e;
  v[0] = p.multiProcessorCount;
  v[1] = (int)p.sharedMemPerBlockOptin;
  v[2] = p.major;
  v[3] = p.clusterLaunch;
  cudaDeviceGetAttribute(&v[4], cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaFuncAttributes a;
  if (int e = cudaFuncGetAttributes(&a, block_sum)) return e;
  v[5] = (int)a.sharedSizeBytes;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&v[6], block_sum, 256, 0);
}
}
