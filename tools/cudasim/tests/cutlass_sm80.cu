// CUTLASS 2.x kernels for sm_80: a bf16 GEMM and a grouped GEMM.
#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_grouped.h"
#include "cutlass/gemm/device/gemm_universal.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
using bf = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Col = cutlass::layout::ColumnMajor;
using Epilogue = cutlass::epilogue::thread::LinearCombination<bf, 8, float, float>;
using Gemm =
    cutlass::gemm::device::GemmUniversal<bf, Row, bf, Col, bf, Row, float, cutlass::arch::OpClassTensorOp,
                                         cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>,
                                         cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
                                         Epilogue, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;
using GroupedKernel = cutlass::gemm::kernel::DefaultGemmGrouped<
    bf, Row, cutlass::ComplexTransform::kNone, 8, bf, Col, cutlass::ComplexTransform::kNone, 8, bf, Row, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<64, 64, 32>,
    cutlass::gemm::GemmShape<32, 32, 32>, cutlass::gemm::GemmShape<16, 8, 16>, Epilogue,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
using Grouped = cutlass::gemm::device::GemmGrouped<GroupedKernel>;

extern "C" int gemm(void* a, void* b, void* c, void* d, int M, int N, int K, int splits, void* ws) {
  Gemm::Arguments args(cutlass::gemm::GemmUniversalMode::kGemm, {M, N, K}, splits, {1.f, 0.5f}, a, b, c, d,
                       (int64_t)M * K, (int64_t)N * K, (int64_t)M * N, (int64_t)M * N, K, K, N, N);
  Gemm g;
  if (g.can_implement(args) != cutlass::Status::kSuccess) return -1;
  if (g.initialize(args, ws) != cutlass::Status::kSuccess) return -2;
  if (g() != cutlass::Status::kSuccess) return -3;
  return cudaDeviceSynchronize();
}

template <class T>
static T* upload(const std::vector<T>& v) {
  T* p;
  cudaMalloc((void**)&p, sizeof(T) * v.size());
  cudaMemcpy(p, v.data(), sizeof(T) * v.size(), cudaMemcpyHostToDevice);
  return p;
}
extern "C" int grouped(int n, const int* mnk, void** a, void** b, void** c, void** d) {
  std::vector<cutlass::gemm::GemmCoord> sizes;
  std::vector<int64_t> ld, ldc;
  std::vector<bf*> pa, pb, pc, pd;
  for (int i = 0; i < n; i++) {
    sizes.push_back({mnk[3 * i], mnk[3 * i + 1], mnk[3 * i + 2]});
    ld.push_back(mnk[3 * i + 2]);
    ldc.push_back(mnk[3 * i + 1]);
    pa.push_back((bf*)a[i]);
    pb.push_back((bf*)b[i]);
    pc.push_back((bf*)c[i]);
    pd.push_back((bf*)d[i]);
  }
  int blocks = Grouped::sufficient(sizes.data(), n);
  if (!blocks) return -4;
  int64_t *l = upload(ld), *lc = upload(ldc);
  typename Grouped::Arguments args(upload(sizes), n, 6, {1.f, 0.5f}, upload(pa), upload(pb), upload(pc), upload(pd), l,
                                   l, lc, lc, sizes.data());
  Grouped g;
  void* ws = nullptr;
  cudaMalloc(&ws, g.get_workspace_size(args) + 16);
  if (g.initialize(args, ws) != cutlass::Status::kSuccess) return -2;
  if (g.run() != cutlass::Status::kSuccess) return -3;
  return cudaDeviceSynchronize();
}
