// sm_90a kernels written directly on PTX: TMA, mbarriers, wgmma, clusters.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

__device__ uint32_t smem(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ void mbar_init(uint64_t* b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(b)), "r"(n));
}
__device__ void mbar_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(b)), "r"(bytes) : "memory");
}
__device__ void mbar_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(b)) : "memory");
}
__device__ void mbar_wait(uint64_t* b, int parity) {
  asm volatile(
      "{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra W; D: }" ::"r"(smem(b)),
      "r"(parity)
      : "memory");
}
__device__ void tma_load(void* dst, const CUtensorMap* m, uint64_t* b, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(smem(dst)),
      "l"(m), "r"(x), "r"(y), "r"(smem(b))
      : "memory");
}
__device__ void tma_store(const CUtensorMap* m, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(m), "r"(x),
               "r"(y), "r"(smem(src))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;");
}
__device__ uint64_t desc(const void* p, int lbo, int sbo, int swizzle) {
  return (uint64_t)((smem(p) & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 |
         (uint64_t)swizzle << 62;
}
template <int TransB>
__device__ void wgmma64x64x16(float (&d)[32], uint64_t a, uint64_t b, int scale) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
      "%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, %35; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(scale), "n"(TransB));
}

constexpr int M = 64, N = 64, K = 64, Stages = 3;
enum Bug { None, NoEmptyWait, EarlyRelease, NoWgmmaWait, NoFullWait };
struct Shared {
  alignas(1024) __nv_bfloat16 a[Stages][M * K], b[Stages][N * K];
  alignas(1024) __nv_bfloat16 out[M * N];
  uint64_t full[Stages], empty[Stages];
};

// Warp 4 produces with TMA, warps 0-3 consume with wgmma. B is K-major, or MN-major with TransB.
template <int TransB, int B_>
__global__ void __launch_bounds__(160)
    gemm(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb,
         const __grid_constant__ CUtensorMap mc, int k) {
  extern __shared__ __align__(1024) char raw[];
  Shared& s = *(Shared*)raw;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages; i++) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 128);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  const int n = k / K, m0 = blockIdx.y * M, n0 = blockIdx.x * N;
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128)
      for (int i = 0; i < n; i++) {
        int st = i % Stages;
        if (i >= Stages && B_ != NoEmptyWait) mbar_wait(&s.empty[st], (i / Stages - 1) & 1);
        mbar_expect(&s.full[st], 2 * 64 * 64 * 2);
        tma_load(s.a[st], &ma, &s.full[st], i * K, m0);
        if (TransB)
          tma_load(s.b[st], &mb, &s.full[st], n0, i * K);
        else
          tma_load(s.b[st], &mb, &s.full[st], i * K, n0);
      }
    return;
  }
  float d[32];
  for (float& x : d) x = 0;
  for (int i = 0; i < n; i++) {
    int st = i % Stages;
    if (B_ != NoFullWait) mbar_wait(&s.full[st], i / Stages & 1);
    asm volatile("wgmma.fence.sync.aligned;");
    for (int kk = 0; kk < K / 16; kk++) {
      uint64_t da = desc((char*)s.a[st] + kk * 32, 16, 1024, 1);
      uint64_t db =
          TransB ? desc((char*)s.b[st] + kk * 16 * 128, 8192, 1024, 1) : desc((char*)s.b[st] + kk * 32, 16, 1024, 1);
      wgmma64x64x16<TransB>(d, da, db, i || kk);
    }
    asm volatile("wgmma.commit_group.sync.aligned;");
    if (B_ == EarlyRelease) mbar_arrive(&s.empty[st]);
    if (B_ != NoWgmmaWait || i + 1 < n) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (B_ != EarlyRelease) mbar_arrive(&s.empty[st]);
  }
  int w = threadIdx.x / 32, l = threadIdx.x % 32;
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++)
      s.out[(w * 16 + l / 4 + 8 * (e >> 1)) * N + j * 8 + l % 4 * 2 + (e & 1)] = __float2bfloat16(d[4 * j + e]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 0) {
    tma_store(&mc, s.out, n0, m0);
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

static bool encode(CUtensorMap* m, void* p, int rows, int cols, int box_rows, int box_cols, int swizzle) {
  typedef CUresult (*Fn)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                         const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Fn f = nullptr;
  if (!f) {
    cudaDriverEntryPointQueryResult q;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&f, 12000, cudaEnableDefault, &q);
  }
  cuuint64_t dim[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)cols * 2};
  cuuint32_t box[2] = {(cuuint32_t)box_cols, (cuuint32_t)box_rows}, es[2] = {1, 1};
  return f(m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p, dim, stride, box, es, CU_TENSOR_MAP_INTERLEAVE_NONE,
           (CUtensorMapSwizzle)swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
template <int T, int B_>
int run(void* a, void* b, void* c, int m, int n, int k) {
  CUtensorMap ma, mb, mc;
  if (!encode(&ma, a, m, k, M, K, 3) || !encode(&mb, b, T ? k : n, T ? n : k, 64, 64, 3) ||
      !encode(&mc, c, m, n, M, N, 0))
    return -1;
  cudaFuncSetAttribute(gemm<T, B_>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Shared));
  gemm<T, B_><<<dim3((n + N - 1) / N, (m + M - 1) / M), 160, sizeof(Shared)>>>(ma, mb, mc, k);
  return cudaDeviceSynchronize();
}

// Every swizzle mode: load a box and write it out again as shared memory holds it.
__global__ void swizzled(const __grid_constant__ CUtensorMap m, uint16_t* out, int bytes, int x, int y) {
  extern __shared__ __align__(1024) char raw[];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
    mbar_expect(&bar, bytes);
    tma_load(raw, &m, &bar, x, y);
  }
  __syncthreads();
  mbar_wait(&bar, 0);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = ((uint16_t*)raw)[i];
}

// Cluster of two: each block writes into the other's shared memory and reads what it got.
__global__ void __cluster_dims__(2, 1, 1) exchange(int* out) {
  __shared__ int box[64];
  uint32_t rank, remote;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem(&box[threadIdx.x])), "r"(rank ^ 1));
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(1000 * blockIdx.x + threadIdx.x) : "memory");
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  out[blockIdx.x * 64 + threadIdx.x] = box[63 - threadIdx.x];
}
// Multicast: block 0 loads for both.
__global__ void __cluster_dims__(2, 1, 1) multicast(const int* in, int* out) {
  __shared__ alignas(128) int buf[64];
  __shared__ uint64_t bar;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
    mbar_expect(&bar, 256);
  }
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
  if (rank == 0 && threadIdx.x == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(smem(buf)),
        "l"(in), "r"(256), "r"(smem(&bar)), "h"((short)3)
        : "memory");
  mbar_wait(&bar, 0);
  out[blockIdx.x * 64 + threadIdx.x] = buf[threadIdx.x] + rank;
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
// A generic write followed by a bulk store; Fence = 0 leaves the proxy fence out.
template <bool Fence>
__global__ void bulk_store(int* out) {
  __shared__ alignas(128) int buf[64];
  buf[threadIdx.x] = 3 * threadIdx.x;
  if (Fence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256; cp.async.bulk.commit_group; "
        "cp.async.bulk.wait_group 0;" ::"l"(out),
        "r"(smem(buf))
        : "memory");
  }
}
// The buffer is overwritten before the store has read it (wait_group.read left out).
__global__ void overwritten_store(int* out) {
  __shared__ alignas(128) int buf[64];
  buf[threadIdx.x] = threadIdx.x;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256; cp.async.bulk.commit_group;" ::"l"(out),
                 "r"(smem(buf))
                 : "memory");
  __syncthreads();
  buf[threadIdx.x] = -1;
}
__global__ void reduce_add(float* out) {
  __shared__ alignas(128) float buf[32];
  buf[threadIdx.x] = threadIdx.x + 0.5f;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0)
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 128; cp.async.bulk.commit_group; "
        "cp.async.bulk.wait_group 0;" ::"l"(out),
        "r"(smem(buf))
        : "memory");
}

__global__ void never_complete() {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) mbar_init(&bar, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbar_arrive(&bar);
  mbar_wait(&bar, 0);
}
__global__ void no_init() {
  __shared__ uint64_t bar;
  mbar_wait(&bar, 0);
}

extern "C" {
int h_never() {
  never_complete<<<2, 64>>>();
  return cudaDeviceSynchronize();
}
int h_no_init() {
  no_init<<<1, 32>>>();
  return cudaDeviceSynchronize();
}
int h_gemm(void* a, void* b, void* c, int m, int n, int k, int trans, int bug) {
  if (trans) return run<1, None>(a, b, c, m, n, k);
  switch (bug) {
    case 1: return run<0, NoEmptyWait>(a, b, c, m, n, k);
    case 2: return run<0, EarlyRelease>(a, b, c, m, n, k);
    case 3: return run<0, NoWgmmaWait>(a, b, c, m, n, k);
    case 4: return run<0, NoFullWait>(a, b, c, m, n, k);
    default: return run<0, None>(a, b, c, m, n, k);
  }
}
int h_swizzle(void* in, void* out, int rows, int cols, int br, int bc, int mode, int x, int y) {
  CUtensorMap m;
  if (!encode(&m, in, rows, cols, br, bc, mode)) return -1;
  swizzled<<<1, 64, br * bc * 2>>>(m, (uint16_t*)out, br * bc * 2, x, y);
  return cudaDeviceSynchronize();
}
int h_exchange(int* o) {
  exchange<<<4, 64>>>(o);
  return cudaDeviceSynchronize();
}
int h_multicast(const int* i, int* o) {
  multicast<<<2, 64>>>(i, o);
  return cudaDeviceSynchronize();
}
int h_bulk(int* o, int fence) {
  if (fence)
    bulk_store<true><<<1, 64>>>(o);
  else
    bulk_store<false><<<1, 64>>>(o);
  return cudaDeviceSynchronize();
}
int h_overwritten(int* o) {
  overwritten_store<<<1, 64>>>(o);
  return cudaDeviceSynchronize();
}
int h_reduce(float* o) {
  reduce_add<<<3, 32>>>(o);
  return cudaDeviceSynchronize();
}
}
