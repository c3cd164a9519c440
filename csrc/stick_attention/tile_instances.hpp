// The tables of compiled kernels whose blocks own a tile of rows each: of queries or, those of dK and dV, of keys.
#pragma once

#include "stick_attention/stick_instances.hpp"

namespace mfx::stick {

struct ForwardLaunch;
struct BackwardLaunch;

template <typename Launch>
struct TileInstance {
  const char* name;
  DType dtype;
  bool tf32;
  int most_head_dim;
  int tile_rows, threads, shared_bytes;  // of a block
  void (*kernel)(Launch);
  // Of those that share a tile among the blocks of a cluster: how many, the grid's y. They serve head dims above 256
  // where K is V.
  int cluster = 1;
};

template <typename Launch>
struct TileInstances {
  const TileInstance<Launch>* first;
  int count;
};

// A table's row. `Shape` has what a block needs.
template <typename Shape, typename Launch>
constexpr TileInstance<Launch> tile_instance(const char* name, DType dtype, bool tf32, int most_head_dim,
                                             void (*kernel)(Launch)) {
  return {name, dtype, tf32, most_head_dim, Shape::kRows, Shape::kThreads, Shape::kSharedBytes, kernel};
}

// Those that need CUTLASS and run on sm_90a alone; a build may lack them.
TileInstances<ForwardLaunch> forward_instances_sm90a();
TileInstances<BackwardLaunch> backward_dq_instances_sm90a();
TileInstances<BackwardLaunch> backward_dkv_instances_sm90a();
#ifdef MFX_SM90
#define MFX_SM90_INSTANCES(function) function()
#else
#define MFX_SM90_INSTANCES(function) {nullptr, 0}
#endif

// Names them as kernels of `op`.
template <typename Launch>
void list_sm90a(TileInstances<Launch> instances, const char* op, KernelSink sink, void* context) {
  for (int i = 0; i < instances.count; ++i) sink(context, op, instances.first[i].name, 90);
}

// The one that serves a problem on a device of `capability`, or null: they run at compute capability 9.0 alone.
template <typename Launch>
const TileInstance<Launch>* find_sm90a(TileInstances<Launch> instances, const StickAttentionProblem& p,
                                       int capability) {
  if (capability != 90) return nullptr;
  const TileInstance<Launch>* const instance = find_instance(instances.first, instances.count, p);
  const bool serves = instance == nullptr || instance->cluster == 1 || (p.k_is_v && p.head_dim > kStickTiledHeadDim);
  return serves ? instance : nullptr;
}

}  // namespace mfx::stick
