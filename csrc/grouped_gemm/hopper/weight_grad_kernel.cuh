// The weight gradients of grouped_gemm/weight_grad_kernel.cuh on sm_90a, by the warpgroups of row_product_kernel.cuh:
// both operands are gathered by cp.async. Depth that an expert's last slice lacks is zero in both.
#pragma once

#include "grouped_gemm/hopper/warpgroup_epilogue.cuh"
#include "grouped_gemm/weight_grad_kernel.cuh"

namespace mfx::grouped {

template <typename Op>
class HopperWeightGrad {
 public:
  using Params = WeightGradParams;
  using Shape = device::WarpgroupShape;
  static constexpr Product kProduct = Product::kWeightGrad;
  static constexpr bool kTransposed = false, kAligned = true, kExactArch = true;
  static constexpr int kArch = 90, kBlockThreads = Shape::kBlockThreads;

 private:
  using T = typename Storage<Op>::Type;
  using Gemm = device::WarpgroupGemm<Op, Major::kMN, Major::kMN>;
  using Out = WarpgroupEpilogue;
  static constexpr int kConsumerWarps = Shape::kConsumers * device::kWarpgroup / 32;

  struct Shared {
    alignas(1024) unsigned char stages[Shape::kPipelineBytes];
    alignas(16) unsigned char rows[kConsumerWarps][Out::kBytesPerWarp];
    Shape::Barriers ring;
  };

  // A tile of one matrix, and the positions that are summed over: none where nobody wants the matrix.
  struct Tile {
    char* grad;
    int row, column, first, depth;

    __device__ Tile(const Params& p, unsigned i) {
      const unsigned row_tiles = (p.in_features + Shape::kRows - 1) / Shape::kRows;
      const unsigned column_tiles = (p.out_features + Shape::kColumns - 1) / Shape::kColumns;
      const unsigned expert = i / (row_tiles * column_tiles), local = i % (row_tiles * column_tiles);
      grad = expert < p.num_experts ? p.grad_weight[expert] : nullptr;
      row = local % row_tiles * Shape::kRows;
      column = local / row_tiles * Shape::kColumns;
      first = grad != nullptr ? p.offsets[expert] : 0;
      depth = grad != nullptr ? p.offsets[expert + 1] - first : 0;
    }
    __device__ int slices() const { return (depth + Shape::kDepth - 1) / Shape::kDepth; }
  };

 public:
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kColumnsPerDot = Out::kColumnsPerPart;

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(1024) unsigned char raw[];
    Shared& shared = *reinterpret_cast<Shared*>(raw);
    if (threadIdx.x == 0) shared.ring.init(/*bulk_copies=*/false);
    device::take_roles([&] { load(p, shared); }, [&](int warpgroup) { multiply(p, shared, warpgroup); });
  }

 private:
  static __device__ void load(const Params& p, Shared& shared) {
    Shape::Producer ring(shared.ring);
    const SharedAddress stages = device::shared_address(shared.stages);
    for (unsigned i = blockIdx.x; i < p.tiles; i += gridDim.x) {
      const Tile tile(p, i);
      RoutedLoader<T, Shape, true> rows(p, tile.row, tile.column, tile.first, tile.depth);
      for (int left = tile.depth; left > 0; left -= Shape::kDepth) {
        rows.load(stages + ring.acquire() * Shape::kStageBytes, left);
        ring.commit();
      }
    }
    ring.drain();
  }

  static __device__ void multiply(const Params& p, Shared& shared, int consumer) {
    Shape::Consumer ring(shared.ring, consumer);
    unsigned char* const own = shared.rows[threadIdx.x / 32 - device::kWarpgroup / 32];
    int turn = 0;
    for (unsigned i = blockIdx.x; i < p.tiles; i += gridDim.x, turn = (turn + 1) % Shape::kConsumers) {
      const Tile tile(p, i);
      if (turn != consumer) {
        ring.skip(tile.slices());
        continue;
      }
      device::WarpgroupAcc acc;  // dW = X^T G
      const SharedAddress stages = device::shared_address(shared.stages);
      const int rows = p.in_features - tile.row;
      if (rows > 64) {
        device::mainloop<Gemm, 2>(acc, stages, ring, tile.slices());
      } else {
        device::mainloop<Gemm, 1>(acc, stages, ring, tile.slices());
      }
      if (tile.grad == nullptr) continue;
      Out::visit<false>(acc, device::shared_address(own), rows, [&](int tile_column) {
        const int column = tile.column + tile_column, left = p.out_features - column;
        char* const to = tile.grad + tile.row * p.grad_weight.row_bytes + column * static_cast<std::int64_t>(sizeof(T));
        return [&, left, to](int row, const float4& sums, const float4&) {
          if (left > 0 && row < rows) store4<T, true>(to + row * p.grad_weight.row_bytes, sums, left);
        };
      });
    }
  }
};

}  // namespace mfx::grouped
