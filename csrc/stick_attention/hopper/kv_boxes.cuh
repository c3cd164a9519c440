// How tiles of K and V lie in shared memory for wgmma, which takes a tile's rows in their order, so that keys are
// interleaved where they are stored: the scan wants lane c of a quad, which has columns 8j + 2c + b of the scores, to
// own the keys c * kRun + 2j + b (interleaved_keys.cuh).
#pragma once

#include "tile/warpgroup_boxes.cuh"

namespace mfx::stick {

// A tile of kKeys is made of boxes of 64 columns; one of K and, after it, one of V make a stage, or where K is V, one
// of K alone.
template <int kDim, int kKeys_, int kStages_>
struct KvBoxes {
  static constexpr int kKeys = kKeys_, kStages = kStages_, kRun = kKeys / device::kQuad;
  static constexpr int kBoxBytes = kKeys * device::kBoxRowBytes;
  static constexpr int kTileBytes = kDim / 64 * kBoxBytes, kStageBytes = 2 * kTileBytes;

  // The row of a box that has a key. Bits of the key change places, so that rows of keys without common bits add up.
  __host__ __device__ static constexpr int row_of(int key) { return key % kRun / 2 * 8 + key / kRun * 2 + key % 2; }
};

// The same where K is V.
template <int kDim, int kKeys, int kStages>
struct SharedKvBoxes : KvBoxes<kDim, kKeys, kStages> {
  static constexpr int kStageBytes = KvBoxes<kDim, kKeys, kStages>::kTileBytes;
};

}  // namespace mfx::stick
