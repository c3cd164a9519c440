#include <cuda_bf16.h>
#include <mma.h>
using namespace nvcuda;
template <class T, int M, int N, int K, class LA, class LB, class Acc>
__global__ void tile(const T* a, const T* b, Acc* c, int lda, int ldb, int ldc) {
  __shared__ alignas(32) T sa[M * K];
  for (int i = threadIdx.x; i < M * K; i += 32) sa[i] = a[i];
  __syncwarp();
  wmma::fragment<wmma::matrix_a, M, N, K, T, LA> fa;
  wmma::fragment<wmma::matrix_b, M, N, K, T, LB> fb;
  wmma::fragment<wmma::accumulator, M, N, K, Acc> fc;
  wmma::load_matrix_sync(fa, sa, lda);
  wmma::load_matrix_sync(fb, b, ldb);
  wmma::load_matrix_sync(fc, c, ldc, wmma::mem_row_major);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(c, fc, ldc, wmma::mem_row_major);
}
extern "C" int w_tile(int kind, void* a, void* b, void* c) {
  using R = wmma::row_major;
  using C = wmma::col_major;
  switch (kind) {
    case 0: tile<half, 16, 16, 16, R, C, float><<<1, 32>>>((half*)a, (half*)b, (float*)c, 16, 16, 16); break;
    case 1: tile<half, 16, 16, 16, R, R, half><<<1, 32>>>((half*)a, (half*)b, (half*)c, 16, 16, 16); break;
    case 2:
      tile<__nv_bfloat16, 32, 8, 16, C, C, float>
          <<<1, 32>>>((__nv_bfloat16*)a, (__nv_bfloat16*)b, (float*)c, 32, 16, 8);
      break;
    case 3:
      tile<signed char, 16, 16, 16, R, C, int><<<1, 32>>>((signed char*)a, (signed char*)b, (int*)c, 16, 16, 16);
      break;
    default: tile<double, 8, 8, 4, R, R, double><<<1, 32>>>((double*)a, (double*)b, (double*)c, 4, 8, 8);
  }
  return cudaDeviceSynchronize();
}
