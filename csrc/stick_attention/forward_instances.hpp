// The table of forward's compiled kernels.
#pragma once

#include "stick_attention/stick_instances.hpp"

namespace mfx::stick {

struct ForwardLaunch;

struct ForwardInstance {
  const char* name;
  DType dtype;
  bool tf32;
  int most_head_dim;
  int tile_rows, threads, shared_bytes;  // of a block
  void (*kernel)(ForwardLaunch);
};

struct ForwardInstances {
  const ForwardInstance* first;
  int count;
};

// Those that need CUTLASS and run on sm_90a alone; a build may lack both.
ForwardInstances forward_instances_sm90a();

}  // namespace mfx::stick
