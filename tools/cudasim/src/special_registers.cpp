#include "special_registers.h"

namespace cudasim {

namespace {
enum Special : uint8_t {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NWarpId,
  SmId,
  NSmId,
  GridId,
  LaneEq,
  LaneLt,
  LaneLe,
  LaneGt,
  LaneGe,
  Clock,
  ClockHi,
  Clock64,
  GlobalTimer,
  GlobalTimerLo,
  GlobalTimerHi,
  DynSmem,
  TotalSmem,
  AggrSmem,
  ClusterIdX,
  ClusterIdY,
  ClusterIdZ,
  NClusterIdX,
  NClusterIdY,
  NClusterIdZ,
  ClusterCtaX,
  ClusterCtaY,
  ClusterCtaZ,
  ClusterNctaX,
  ClusterNctaY,
  ClusterNctaZ,
  ClusterCtaRank,
  ClusterNctaRank,
  IsExplicitCluster,
  Graph,
  Env
};
const SpecialRegister kSpecials[] = {
    {"%tid.x", TidX, 4},
    {"%tid.y", TidY, 4},
    {"%tid.z", TidZ, 4},
    {"%ntid.x", NtidX, 4},
    {"%ntid.y", NtidY, 4},
    {"%ntid.z", NtidZ, 4},
    {"%ctaid.x", CtaidX, 4},
    {"%ctaid.y", CtaidY, 4},
    {"%ctaid.z", CtaidZ, 4},
    {"%nctaid.x", NctaidX, 4},
    {"%nctaid.y", NctaidY, 4},
    {"%nctaid.z", NctaidZ, 4},
    {"%laneid", LaneId, 4},
    {"%warpid", WarpId, 4},
    {"%nwarpid", NWarpId, 4},
    {"%smid", SmId, 4},
    {"%nsmid", NSmId, 4},
    {"%gridid", GridId, 8},
    {"%lanemask_eq", LaneEq, 4},
    {"%lanemask_lt", LaneLt, 4},
    {"%lanemask_le", LaneLe, 4},
    {"%lanemask_gt", LaneGt, 4},
    {"%lanemask_ge", LaneGe, 4},
    {"%clock", Clock, 4},
    {"%clock_hi", ClockHi, 4},
    {"%clock64", Clock64, 8},
    {"%globaltimer", GlobalTimer, 8},
    {"%globaltimer_lo", GlobalTimerLo, 4},
    {"%globaltimer_hi", GlobalTimerHi, 4},
    {"%dynamic_smem_size", DynSmem, 4},
    {"%total_smem_size", TotalSmem, 4},
    {"%aggr_smem_size", AggrSmem, 4},
    {"%clusterid.x", ClusterIdX, 4},
    {"%clusterid.y", ClusterIdY, 4},
    {"%clusterid.z", ClusterIdZ, 4},
    {"%nclusterid.x", NClusterIdX, 4},
    {"%nclusterid.y", NClusterIdY, 4},
    {"%nclusterid.z", NClusterIdZ, 4},
    {"%cluster_ctaid.x", ClusterCtaX, 4},
    {"%cluster_ctaid.y", ClusterCtaY, 4},
    {"%cluster_ctaid.z", ClusterCtaZ, 4},
    {"%cluster_nctaid.x", ClusterNctaX, 4},
    {"%cluster_nctaid.y", ClusterNctaY, 4},
    {"%cluster_nctaid.z", ClusterNctaZ, 4},
    {"%cluster_ctarank", ClusterCtaRank, 4},
    {"%cluster_nctarank", ClusterNctaRank, 4},
    {"%is_explicit_cluster", IsExplicitCluster, 0},
    {"%current_graph_exec", Graph, 8},
    {"%reserved_smem_offset_begin", Env, 4},
};
}  // namespace

const SpecialRegister* findSpecial(const std::string& name) {
  for (auto& s : kSpecials)
    if (name == s.name) return &s;
  return nullptr;
}

void readSpecial(Warp& w, const Inst& I) {
  const Block& b = *w.block;
  const Cluster& c = *b.cluster;
  const LaunchConfig& g = w.launch->cfg;
  uint64_t v = 0;
  bool perLane = false;
  uint64_t lane[32];
  auto each = [&](auto f) {
    perLane = true;
    for (int i = 0; i < 32; i++) lane[i] = f(i);
  };
  auto thread = [&](int i) { return (uint32_t)(w.id * 32 + i); };
  uint64_t now = w.launch->progress * 16 + w.issued * 4;
  switch ((Special)I.sub) {
    case TidX: each([&](int i) { return thread(i) % g.block[0]; }); break;
    case TidY: each([&](int i) { return thread(i) / g.block[0] % g.block[1]; }); break;
    case TidZ: each([&](int i) { return thread(i) / (g.block[0] * g.block[1]); }); break;
    case NtidX: v = g.block[0]; break;
    case NtidY: v = g.block[1]; break;
    case NtidZ: v = g.block[2]; break;
    case CtaidX: v = b.idx[0]; break;
    case CtaidY: v = b.idx[1]; break;
    case CtaidZ: v = b.idx[2]; break;
    case NctaidX: v = g.grid[0]; break;
    case NctaidY: v = g.grid[1]; break;
    case NctaidZ: v = g.grid[2]; break;
    case LaneId: each([&](int i) { return i; }); break;
    case WarpId: v = w.id; break;
    case NWarpId: v = 64; break;
    case SmId: v = b.linear % 132; break;
    case NSmId: v = 132; break;
    case GridId: v = w.launch->id; break;
    case LaneEq: each([&](int i) { return 1u << i; }); break;
    case LaneLt: each([&](int i) { return (1u << i) - 1; }); break;
    case LaneLe: each([&](int i) { return (2u << i) - 1; }); break;
    case LaneGt: each([&](int i) { return ~((2u << i) - 1); }); break;
    case LaneGe: each([&](int i) { return ~((1u << i) - 1); }); break;
    case Clock:
    case Clock64: v = now; break;
    case ClockHi: v = now >> 32; break;
    case GlobalTimer:
    case GlobalTimerLo: v = now; break;
    case GlobalTimerHi: v = now >> 32; break;
    case DynSmem: v = g.dynamicShared; break;
    case TotalSmem:
    case AggrSmem: v = b.sharedEnd - kSharedBase; break;
    case ClusterIdX: v = c.idx[0]; break;
    case ClusterIdY: v = c.idx[1]; break;
    case ClusterIdZ: v = c.idx[2]; break;
    case NClusterIdX: v = g.grid[0] / c.dim[0]; break;
    case NClusterIdY: v = g.grid[1] / c.dim[1]; break;
    case NClusterIdZ: v = g.grid[2] / c.dim[2]; break;
    case ClusterCtaX: v = b.idx[0] % c.dim[0]; break;
    case ClusterCtaY: v = b.idx[1] % c.dim[1]; break;
    case ClusterCtaZ: v = b.idx[2] % c.dim[2]; break;
    case ClusterNctaX: v = c.dim[0]; break;
    case ClusterNctaY: v = c.dim[1]; break;
    case ClusterNctaZ: v = c.dim[2]; break;
    case ClusterCtaRank: v = b.rank; break;
    case ClusterNctaRank: v = c.blocks.size(); break;
    case IsExplicitCluster: w.setPred(I.op[0], c.blocks.size() > 1 ? ~0u : 0); return;
    case Graph:
    case Env: v = 0; break;
  }
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    uint64_t x = perLane ? lane[i] : v;
    if (I.op[0].width == 8)
      w.reg<uint64_t>(I.op[0])[i] = x;
    else if (I.op[0].width == 2)
      w.reg<uint16_t>(I.op[0])[i] = (uint16_t)x;
    else
      w.reg<uint32_t>(I.op[0])[i] = (uint32_t)x;
  }
}

}  // namespace cudasim
