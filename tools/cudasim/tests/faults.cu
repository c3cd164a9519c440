// Kernels with deliberate errors, for test_faults.py.
#include <cuda_pipeline.h>

// With sync = 0 the barrier between writing and reading is missing.
template <bool Sync>
__global__ void exchange(int* out) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  if (Sync) __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}
// The second round overwrites the buffer while other warps may still read it.
template <bool Sync>
__global__ void reuse(int* out) {
  __shared__ int s[128];
  int sum = 0;
  for (int r = 0; r < 4; r++) {
    s[threadIdx.x] = threadIdx.x * r;
    __syncthreads();
    sum += s[(threadIdx.x + 40) % 128];
    if (Sync) __syncthreads();
  }
  out[threadIdx.x] = sum;
}
// Adjacent bytes of one word written by different warps: no race.
__global__ void adjacent_bytes(int* out) {
  __shared__ unsigned char s[256];
  s[(threadIdx.x % 32) * 4 + threadIdx.x / 32] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
// Depth-two cp.async pipeline; Wait = number of groups left in flight.
template <int Wait>
__global__ void pipeline(const float4* in, float4* out, int n) {
  __shared__ float4 buf[2][64];
  auto load = [&](int k) {
    __pipeline_memcpy_async(&buf[k & 1][threadIdx.x], &in[k * 64 + threadIdx.x], 16);
    __pipeline_commit();
  };
  load(0);
  for (int k = 0; k < n; k++) {
    if (k + 1 < n)
      load(k + 1);
    else
      __pipeline_commit();
    __pipeline_wait_prior(Wait);
    __syncthreads();
    float4 v = buf[k & 1][63 - threadIdx.x];
    out[k * 64 + threadIdx.x] = {v.x + 1, v.y, v.z, v.w};
    __syncthreads();
  }
}
__global__ void store_at(float* p, long long i) {
  if (threadIdx.x == 5) p[i] = 1;
}
__global__ void shared_at(float* p, int i) {
  extern __shared__ float s[];
  s[threadIdx.x + i] = 1;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
__global__ void misaligned(float* p) {
  *(float4*)(p + 1) = {1, 2, 3, 4};
}
__global__ void local_oob(int* p, int n) {
  volatile int a[8];
  for (int i = 0; i < n; i++) a[i] = i;
  p[0] = a[n / 2];
}
__global__ void bad_shfl(int* p) {
  if (threadIdx.x < 16) p[threadIdx.x] = __shfl_sync(0xff, threadIdx.x, 3);
}
__global__ void uninit(float* p) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}

// Warps load a flag that one of them sets without a barrier in between.
template <bool Sync>
__global__ void global_flag(int* flag, int* out) {
  int f = *flag;
  if (Sync) __syncthreads();
  if (threadIdx.x == 0) *flag = 1;
  out[threadIdx.x] = f;
}

extern "C" {
int f_flag(int* f, int* o, int sync) {
  if (sync)
    global_flag<true><<<1, 128>>>(f, o);
  else
    global_flag<false><<<1, 128>>>(f, o);
  return cudaDeviceSynchronize();
}
int f_exchange(int* o, int sync) {
  if (sync)
    exchange<true><<<1, 128>>>(o);
  else
    exchange<false><<<1, 128>>>(o);
  return cudaDeviceSynchronize();
}
int f_reuse(int* o, int sync) {
  if (sync)
    reuse<true><<<2, 128>>>(o);
  else
    reuse<false><<<2, 128>>>(o);
  return cudaDeviceSynchronize();
}
int f_bytes(int* o) {
  adjacent_bytes<<<1, 128>>>(o);
  return cudaDeviceSynchronize();
}
int f_pipeline(const void* i, void* o, int n, int wait) {
  if (wait == 1)
    pipeline<1><<<1, 64>>>((const float4*)i, (float4*)o, n);
  else
    pipeline<2><<<1, 64>>>((const float4*)i, (float4*)o, n);
  return cudaDeviceSynchronize();
}
int f_store(float* p, long long i) {
  store_at<<<1, 32>>>(p, i);
  return cudaDeviceSynchronize();
}
int f_shared(float* p, int i, int bytes) {
  shared_at<<<1, 32, bytes>>>(p, i);
  return cudaDeviceSynchronize();
}
// Captures memset, launch and copy, replays them twice; returns the error of a synchronisation within a second capture.
int f_capture(int* o, int* copy, int* replays, int* status) {
  cudaStream_t s;
  cudaGraph_t g;
  cudaGraphExec_t x;
  cudaStreamCaptureStatus st;
  cudaStreamCreate(&s);
  if (int e = cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal)) return e;
  cudaMemsetAsync(o, 0, 512, s);
  exchange<true><<<1, 128, 0, s>>>(o);
  cudaMemcpyAsync(copy, o, 512, cudaMemcpyDeviceToDevice, s);
  cudaStreamIsCapturing(s, &st);
  *status = st;
  if (int e = cudaStreamEndCapture(s, &g)) return e;
  if (int e = cudaGraphInstantiate(&x, g, 0)) return e;
  replays[0] = copy[1];
  cudaGraphLaunch(x, s);
  replays[1] = copy[1];
  copy[1] = 0;
  cudaGraphLaunch(x, s);
  replays[2] = copy[1];
  cudaGraphExecDestroy(x);
  cudaGraphDestroy(g);
  cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
  int e = cudaStreamSynchronize(s);
  replays[3] = cudaStreamEndCapture(s, &g);
  cudaGetLastError();
  return e;
}
int f_versions() {
  cudaFuncAttributes a;
  return cudaFuncGetAttributes(&a, bad_shfl) ? -1 : a.ptxVersion * 1000 + a.binaryVersion;
}
int f_misaligned(float* p) {
  misaligned<<<1, 1>>>(p);
  return cudaDeviceSynchronize();
}
int f_local(int* p, int n) {
  local_oob<<<1, 1>>>(p, n);
  return cudaDeviceSynchronize();
}
int f_shfl(int* p) {
  bad_shfl<<<1, 32>>>(p);
  return cudaDeviceSynchronize();
}
int f_uninit(float* p) {
  uninit<<<1, 64>>>(p);
  return cudaDeviceSynchronize();
}
int f_limits(float* p, int threads, int smem) {
  shared_at<<<1, threads, smem>>>(p, 0);
  return cudaGetLastError();
}
}
