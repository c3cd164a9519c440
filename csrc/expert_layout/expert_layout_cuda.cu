// Stable counting sort without atomics. Slots are cut into chunks, one warp each:
//
//   count    cells[e][c] = slots of chunk c that chose expert e
//   prefix   cells[e][c] = first position of those slots: exclusive prefix sums over (e, c), counts and offsets with it
//   scatter  each warp walks its chunk in order, 32 slots at a time: lanes with the same expert find one another with
//            match.any, and a lane's position is its expert's cell plus its rank among them
//
// Few chunks (decoding, small batches) fit one block, which then does all three; else each is a launch.
//
// An id out of range counts as the nearest expert, so that whatever follows stays within bounds, and is left in a word
// of host memory, which every later launch looks at: nothing waits for the device, and the device goes on.
#include <mutex>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "moduleformer_ext/expert_layout.hpp"
#include "tile/warp_reduce.cuh"

namespace mfx::expert_layout_kernels {

using device::kAllLanes;
using device::lane_id;

constexpr int kLanes = device::kWarp;
constexpr std::int64_t kMinSlotsPerChunk = 128;
constexpr std::int64_t kMaxChunks = 1024;
constexpr int kWarpsPerBlock = 8;     // of count and scatter
constexpr int kPrefixThreads = 1024;  // one block: all prefix sums meet there

// What the kernels need, by value.
struct Sort {
  const void* ids;
  std::int64_t num_slots;
  std::int64_t num_experts;
  std::int64_t num_chunks;
  std::int64_t slots_per_chunk;
  std::int32_t* cells;  // [num_experts][num_chunks]
  std::int32_t* counts;
  std::int32_t* offsets;
  std::int32_t* slot_order;
  std::int32_t* position;
  std::int64_t* bad_id;  // host memory
};

// f(slot, expert, the lanes of this step that chose the same expert) for the slots of a chunk, in steps of 32.
template <typename Id, typename F>
__device__ void walk_chunk(const Sort& sort, std::int64_t chunk, F f) {
  const std::int64_t begin = chunk * sort.slots_per_chunk;
  const std::int64_t end = min(sort.num_slots, begin + sort.slots_per_chunk);
  for (std::int64_t slot = begin + lane_id(); slot - lane_id() < end; slot += kLanes) {
    const unsigned active = __ballot_sync(kAllLanes, slot < end);
    if (slot < end) {
      const auto id = static_cast<std::int64_t>(static_cast<const Id*>(sort.ids)[slot]);
      const std::int64_t expert = min(max(id, std::int64_t{0}), sort.num_experts - 1);
      if (id != expert) *static_cast<volatile std::int64_t*>(sort.bad_id) = id;
      f(slot, expert, __match_any_sync(active, expert));
    }
    __syncwarp();
  }
}

template <typename Id>
__device__ void count_chunk(const Sort& sort, std::int64_t chunk) {
  std::int32_t* cells = sort.cells + chunk;
  for (std::int64_t e = lane_id(); e < sort.num_experts; e += kLanes) cells[e * sort.num_chunks] = 0;
  __syncwarp();
  walk_chunk<Id>(sort, chunk, [&](std::int64_t, std::int64_t expert, unsigned same) {
    if (lane_id() == __ffs(same) - 1) cells[expert * sort.num_chunks] += __popc(same);
  });
}

template <typename Id>
__device__ void scatter_chunk(const Sort& sort, std::int64_t chunk) {
  std::int32_t* cells = sort.cells + chunk;
  walk_chunk<Id>(sort, chunk, [&](std::int64_t slot, std::int64_t expert, unsigned same) {
    const int rank = __popc(same & ((1u << lane_id()) - 1));
    std::int32_t* cell = cells + expert * sort.num_chunks;
    const std::int32_t target = *cell + rank;
    __syncwarp(same);
    if (rank == 0) *cell = target + __popc(same);
    sort.slot_order[target] = static_cast<std::int32_t>(slot);
    sort.position[slot] = target;
  });
}

// Exclusive prefix sums of n values, in place, by one warp; returns start plus their total.
__device__ std::int32_t warp_exclusive_sums(std::int32_t* values, std::int64_t n, std::int32_t start) {
  for (std::int64_t i = lane_id(); i - lane_id() < n; i += kLanes) {
    const std::int32_t value = i < n ? values[i] : 0;
    const std::int32_t sum = start + static_cast<std::int32_t>(device::lanes_prefix_sum(value));
    if (i < n) values[i] = sum - value;
    start = __shfl_sync(kAllLanes, sum, kLanes - 1);
  }
  return start;
}

// By one block: sums per expert, offsets from these, then the cells' first positions.
__device__ void prefix(const Sort& sort) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  for (std::int64_t e = warp; e < sort.num_experts; e += warps) {
    const std::int32_t* cells = sort.cells + e * sort.num_chunks;
    std::int32_t sum = 0;
    for (std::int64_t c = lane_id(); c < sort.num_chunks; c += kLanes) sum += cells[c];
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane_id() == 0) {
      sort.counts[e] = sum;
      sort.offsets[e] = sum;
    }
  }
  __syncthreads();
  if (warp == 0) {
    const std::int32_t total = warp_exclusive_sums(sort.offsets, sort.num_experts, 0);
    if (lane_id() == 0) sort.offsets[sort.num_experts] = total;
  }
  __syncthreads();
  for (std::int64_t e = warp; e < sort.num_experts; e += warps) {
    warp_exclusive_sums(sort.cells + e * sort.num_chunks, sort.num_chunks, sort.offsets[e]);
  }
}

__device__ std::int64_t warp_in_grid() {
  return static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
}

template <typename Id>
__global__ void expert_layout_count(Sort sort) {
  if (warp_in_grid() < sort.num_chunks) count_chunk<Id>(sort, warp_in_grid());
}

__global__ void __launch_bounds__(kPrefixThreads) expert_layout_prefix(Sort sort) {
  prefix(sort);
}

template <typename Id>
__global__ void expert_layout_scatter(Sort sort) {
  if (warp_in_grid() < sort.num_chunks) scatter_chunk<Id>(sort, warp_in_grid());
}

template <typename Id>
__global__ void __launch_bounds__(kPrefixThreads) expert_layout_one_block(Sort sort) {
  const std::int64_t chunk = warp_in_grid();
  if (chunk < sort.num_chunks) count_chunk<Id>(sort, chunk);
  __syncthreads();
  prefix(sort);
  __syncthreads();
  if (chunk < sort.num_chunks) scatter_chunk<Id>(sort, chunk);
}

MFX_LIST_KERNELS(kListed, "expert_layout", 80, "expert_layout_one_block", "expert_layout_count", "expert_layout_prefix",
                 "expert_layout_scatter");

std::int64_t num_chunks(std::int64_t num_slots) {
  const std::int64_t chunks = ceil_div(num_slots, kMinSlotsPerChunk);
  return chunks < 1 ? 1 : chunks > kMaxChunks ? kMaxChunks : chunks;
}

template <typename Id>
Status launch_sort(const Sort& sort, Stream stream) {
  constexpr int kBlock = kWarpsPerBlock * kLanes;
  const auto grid = static_cast<unsigned>(ceil_div(sort.num_chunks, kWarpsPerBlock));
  if (sort.num_chunks <= kPrefixThreads / kLanes) {
    return launch(expert_layout_one_block<Id>, 1, kPrefixThreads, 0, stream, sort);
  }
  Status status = launch(expert_layout_count<Id>, grid, kBlock, 0, stream, sort);
  if (status.ok()) status = launch(expert_layout_prefix, 1, kPrefixThreads, 0, stream, sort);
  if (status.ok()) status = launch(expert_layout_scatter<Id>, grid, kBlock, 0, stream, sort);
  return status;
}

// The last id out of range, which is never 0: that says there was none.
std::int64_t* g_bad_id = nullptr;

// Sets it up with the first launch, which a graph may be capturing.
Status allocate_bad_id() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (g_bad_id != nullptr) return {};
  void* word = nullptr;
  const cudaError_t error = call_runtime([&] {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t result = cudaThreadExchangeStreamCaptureMode(&mode);
    if (result != cudaSuccess) return result;
    result = cudaHostAlloc(&word, sizeof(std::int64_t), cudaHostAllocPortable | cudaHostAllocMapped);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return result;
  });
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  *static_cast<std::int64_t*>(word) = 0;
  g_bad_id = static_cast<std::int64_t*>(word);
  return {};
}

}  // namespace mfx::expert_layout_kernels

namespace mfx {

std::int64_t mfx_expert_layout_cuda_workspace(const ExpertLayoutParams& p) {
  return p.num_experts * expert_layout_kernels::num_chunks(p.num_slots) *
         static_cast<std::int64_t>(sizeof(std::int32_t));
}

Status mfx_expert_layout_cuda(const ExpertLayoutParams& p, Stream stream) {
  if (const Status status = expert_layout_kernels::allocate_bad_id(); !status.ok()) return status;
  const std::int64_t chunks = expert_layout_kernels::num_chunks(p.num_slots);
  const expert_layout_kernels::Sort sort = {p.expert_ids,
                                            p.num_slots,
                                            p.num_experts,
                                            chunks,
                                            ceil_div(p.num_slots, chunks),
                                            static_cast<std::int32_t*>(p.workspace),
                                            p.counts,
                                            p.offsets,
                                            p.slot_order,
                                            p.position,
                                            expert_layout_kernels::g_bad_id};
  return p.ids_are_int64 ? expert_layout_kernels::launch_sort<std::int64_t>(sort, stream)
                         : expert_layout_kernels::launch_sort<std::int32_t>(sort, stream);
}

std::int64_t mfx_expert_layout_cuda_take_bad_id() {
  volatile std::int64_t* const word = expert_layout_kernels::g_bad_id;
  const std::int64_t id = word != nullptr ? *word : 0;
  if (id != 0) *word = 0;
  return id;
}

}  // namespace mfx
