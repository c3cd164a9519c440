// CUTLASS 3.x collective-builder GEMM for sm_90a: TMA, warp-specialised wgmma.
// Built in variants: -DCLUSTER_M, -DCOOPERATIVE, -DB_ROW_MAJOR, -DGROUPED.
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"
using namespace cute;
using bf = cutlass::bfloat16_t;
#ifndef CLUSTER_M
#define CLUSTER_M 1
#endif
#ifdef B_ROW_MAJOR
using LayoutB = cutlass::layout::RowMajor;
#else
using LayoutB = cutlass::layout::ColumnMajor;
#endif
#ifdef GROUPED
using MainSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
using EpiSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
using LayoutA_ = cutlass::layout::RowMajor*;
using LayoutB_ = LayoutB*;
using LayoutC_ = cutlass::layout::RowMajor*;
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
#else
#ifdef COOPERATIVE
using MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpiSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#else
using MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpiSchedule = cutlass::epilogue::TmaWarpSpecialized;
#endif
using LayoutA_ = cutlass::layout::RowMajor;
using LayoutB_ = LayoutB;
using LayoutC_ = cutlass::layout::RowMajor;
using ProblemShape = Shape<int, int, int, int>;
#endif
using TileShape = Shape<_128, _128, _64>;
using ClusterShape = Shape<Int<CLUSTER_M>, _1, _1>;
using Epi = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, bf, LayoutC_, 8, bf, LayoutC_, 8,
    EpiSchedule>::CollectiveOp;
using Main = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, bf, LayoutA_, 8, bf, LayoutB_, 8, float, TileShape,
    ClusterShape, cutlass::gemm::collective::StageCountAutoCarveout<(int)sizeof(typename Epi::SharedStorage)>,
    MainSchedule>::CollectiveOp;
using GemmKernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Main, Epi>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;

static int launch(typename Gemm::Arguments& args) {
  Gemm g;
  if (g.can_implement(args) != cutlass::Status::kSuccess) return -1;
  void* ws = nullptr;
  cudaMalloc(&ws, Gemm::get_workspace_size(args) + 256);
  if (g.initialize(args, ws) != cutlass::Status::kSuccess) return -2;
  if (g.run() != cutlass::Status::kSuccess) return -3;
  return cudaDeviceSynchronize();
}
#ifdef GROUPED
template <class T>
static T* upload(const std::vector<T>& v) {
  T* p;
  cudaMalloc((void**)&p, sizeof(T) * v.size());
  cudaMemcpy(p, v.data(), sizeof(T) * v.size(), cudaMemcpyHostToDevice);
  return p;
}
extern "C" int grouped(int n, const int* mnk, void** a, void** b, void** c, void** d) {
  using SA = typename GemmKernel::InternalStrideA;
  using SB = typename GemmKernel::InternalStrideB;
  using SC = typename GemmKernel::InternalStrideC;
  std::vector<typename ProblemShape::UnderlyingProblemShape> shapes;
  std::vector<SA> sa;
  std::vector<SB> sb;
  std::vector<SC> sc;
  std::vector<const bf*> pa, pb, pc;
  std::vector<bf*> pd;
  for (int i = 0; i < n; i++) {
    int M = mnk[3 * i], N = mnk[3 * i + 1], K = mnk[3 * i + 2];
    shapes.push_back({M, N, K});
    sa.push_back(cutlass::make_cute_packed_stride(SA{}, {M, K, 1}));
    sb.push_back(cutlass::make_cute_packed_stride(SB{}, {N, K, 1}));
    sc.push_back(cutlass::make_cute_packed_stride(SC{}, {M, N, 1}));
    pa.push_back((bf*)a[i]);
    pb.push_back((bf*)b[i]);
    pc.push_back((bf*)c[i]);
    pd.push_back((bf*)d[i]);
  }
  cutlass::KernelHardwareInfo hw;
  hw.sm_count = 4;
  typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGrouped,
                                {n, upload(shapes), shapes.data()},
                                {upload(pa), upload(sa), upload(pb), upload(sb)},
                                {{1.f, 0.5f}, upload(pc), upload(sc), upload(pd), upload(sc)},
                                hw};
  return launch(args);
}
#else
extern "C" int gemm(void* a, void* b, void* c, void* d, int M, int N, int K, int, void*) {
  auto sa = cutlass::make_cute_packed_stride(typename GemmKernel::StrideA{}, {M, K, 1});
  auto sb = cutlass::make_cute_packed_stride(typename GemmKernel::StrideB{}, {N, K, 1});
  auto sc = cutlass::make_cute_packed_stride(typename GemmKernel::StrideC{}, {M, N, 1});
  cutlass::KernelHardwareInfo hw;
  hw.sm_count = 4;
  typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                                {M, N, K, 1},
                                {(bf*)a, sa, (bf*)b, sb},
                                {{1.f, 0.5f}, (bf*)c, sc, (bf*)d, sc},
                                hw};
  return launch(args);
}
#endif
