// The row products of grouped_gemm/row_product_kernel.cuh on sm_90a: a warpgroup that loads and two that multiply.
//
// A persistent grid walks the same tiles in the same order. The block's tiles are dealt to the two multiplying
// warpgroups in turn; the loading one brings the slices of tile after tile into one ring, so that a warpgroup's
// epilogue hides behind the other's products. Every warp finds tiles for itself. Rows of the left operand are gathered
// by cp.async, matrices come by TMA, which fills with zeros beyond their ends.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "grouped_gemm/hopper/params.cuh"
#include "grouped_gemm/hopper/warpgroup_epilogue.cuh"
#include "grouped_gemm/row_product_kernel.cuh"

namespace mfx::grouped {

// kTransposed: memory holds the rows of W^T.
template <typename Op, Product kProduct_, bool kTransposed_>
class HopperRowProduct {
 public:
  using Params = HopperRowProductParams;
  using Shape = device::WarpgroupShape;
  static constexpr Product kProduct = kProduct_;
  static constexpr bool kTransposed = kTransposed_, kAligned = true, kExactArch = true;
  static constexpr int kArch = 90, kBlockThreads = Shape::kBlockThreads;

 private:
  using T = typename Storage<Op>::Type;
  static constexpr bool kForward = kProduct == Product::kForward;
  static constexpr Major kB = kForward != kTransposed ? Major::kMN : Major::kK;
  using Gemm = device::WarpgroupGemm<Op, Major::kK, kB>;
  using Table = RowTable<Shape::kRows>;
  using Out = WarpgroupEpilogue;
  static constexpr int kConsumerWarps = Shape::kConsumers * device::kWarpgroup / 32;

  struct Shared {
    alignas(1024) unsigned char stages[Shape::kPipelineBytes];
    alignas(16) unsigned char rows[kConsumerWarps][Out::kBytesPerWarp];
    Table table[Shape::kConsumers];
    Shape::Barriers ring;
  };

 public:
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kColumnsPerDot = Out::kColumnsPerPart;

  static __device__ void run(const Params& params) {
    extern __shared__ __align__(1024) unsigned char raw[];
    Shared& shared = *reinterpret_cast<Shared*>(raw);
    if (threadIdx.x == 0) shared.ring.init(/*bulk_copies=*/true);
    device::take_roles([&] { load(params, shared); },
                       [&](int warpgroup) { multiply(params.product, shared, warpgroup); });
  }

 private:
  // Columns of the result's tiles, which a gated activation makes of two columns each.
  static __device__ bool gated(const RowProductParams& p) { return kForward && p.activation.gated; }
  static __device__ int tile_columns(const RowProductParams& p) {
    return gated(p) ? Shape::kColumns / 2 : Shape::kColumns;
  }
  static __device__ bool find(const RowProductParams& p, unsigned i, RowTile* tile) {
    const int columns = tile_columns(p);
    return find_row_tile(p.offsets, p.num_experts, Shape::kRows, (p.columns + columns - 1) / columns, i, tile);
  }

  static __device__ void load(const Params& params, Shared& shared) {
    const RowProductParams& p = params.product;
    Shape::Producer ring(shared.ring);
    const SharedAddress stages = device::shared_address(shared.stages);
    RowTile tile;
    for (unsigned i = blockIdx.x; find(p, i, &tile); i += gridDim.x) {
      RowLoader<T, Shape, Shape::kRows, true> rows(
          p.depth, [&](int row) { return p.rows.data + p.rows.offset(tile.first + row, p.slot_order); },
          [&](int row) { return row < tile.rows; });
      for (int k = 0; k < p.depth; k += Shape::kDepth) {
        const int stage = ring.acquire();
        if (threadIdx.x == 0) {
          load_matrix(params, tile, k, shared.stages + stage * Shape::kStageBytes + Shape::kABytes,
                      ring.announce(Shape::kBBytes));
        }
        const SharedAddress to = stages + stage * Shape::kStageBytes;
        k + Shape::kDepth <= p.depth ? rows.template load<true>(to) : rows.template load<false>(to);
        ring.commit();
      }
    }
    ring.drain();
  }

  // The two boxes of a slice, the second of a folded tile from the matrix's other half.
  static __device__ void load_matrix(const Params& params, const RowTile& tile, int k, unsigned char* boxes,
                                     std::uint64_t* arrive) {
    const RowProductParams& p = params.product;
    const int segment = p.matrices.find(tile.expert), expert = tile.expert - p.matrices.first[segment];
    const CUtensorMap* const map = &params.matrices.map[segment];
    const int column = tile.column_tile * tile_columns(p);
#pragma unroll
    for (int half = 0; half < Shape::kColumns / Shape::kBox; ++half) {
      const int at = column + half * (gated(p) ? p.columns : Shape::kBox);
      cute::SM90_TMA_LOAD_3D::copy(map, arrive, static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   boxes + half * Shape::kBoxBytes, kB == Major::kMN ? at : k,
                                   kB == Major::kMN ? k : at, expert);
    }
  }

  static __device__ void multiply(const RowProductParams& p, Shared& shared, int consumer) {
    Shape::Consumer ring(shared.ring, consumer);
    const int slices = (p.depth + Shape::kDepth - 1) / Shape::kDepth;
    Table& table = shared.table[consumer];
    unsigned char* const own = shared.rows[threadIdx.x / 32 - device::kWarpgroup / 32];
    ring.skip(consumer * slices);
    RowTile tile;
    for (unsigned i = blockIdx.x + consumer * gridDim.x; find(p, i, &tile); i += Shape::kConsumers * gridDim.x) {
      device::WarpgroupAcc acc;  // Y = X B
      const SharedAddress stages = device::shared_address(shared.stages);
      if (tile.rows > 64) {
        device::mainloop<Gemm, 2>(acc, stages, ring, slices);
      } else {
        device::mainloop<Gemm, 1>(acc, stages, ring, slices);
      }
      ring.skip((Shape::kConsumers - 1) * slices);
      const int row =
          Out::row_of(device::lane_id() / 16, device::lane_id() % 16);  // a lane for each of the warp's rows
      if (row < tile.rows) describe_row<kProduct>(table, p, tile.first, row);
      __syncwarp();
      finish(p, table, tile, acc, device::shared_address(own));
    }
  }

  static __device__ void finish(const RowProductParams& p, const Table& table, const RowTile& tile,
                                const device::WarpgroupAcc& acc, SharedAddress own) {
    if constexpr (kProduct == Product::kInputGrad) {
      visit_with_dots<InputGradOp<T, true>>(p, table, tile, acc, own);
    } else if constexpr (kProduct == Product::kHiddenGrad) {
      visit_with_dots<HiddenGradOp<T, true>>(p, table, tile, acc, own);
    } else if (gated(p)) {
      visit<true, ForwardOp<T, true, true>>(p, table, tile, acc, own);
    } else if (p.activation.function != Activation::kNone || p.bias != nullptr) {
      visit<false, ForwardOp<T, false, true>>(p, table, tile, acc, own);
    } else {
      visit<false, PlainOp<T, true>>(p, table, tile, acc, own);
    }
  }

  template <bool kFolded, typename OutputOp>
  static __device__ void visit(const RowProductParams& p, const Table& table, const RowTile& tile,
                               const device::WarpgroupAcc& acc, SharedAddress own) {
    const int first = tile.column_tile * tile_columns(p);
    Out::visit<kFolded>(acc, own, tile.rows, [&](int column) {
      return [&, op = OutputOp(p, tile, first + column)](int row, const float4& y, const float4& partner) {
        if (op.left > 0 && row < tile.rows) op(row, y, partner, table);
      };
    });
  }

  // Sums what each row's lanes return to `dots`, one number for each kColumnsPerDot columns.
  template <typename OutputOp>
  static __device__ void visit_with_dots(const RowProductParams& p, const Table& table, const RowTile& tile,
                                         const device::WarpgroupAcc& acc, SharedAddress own) {
    constexpr int kLanes = Out::kLanes<false>;
    Out::visit<false>(acc, own, tile.rows, [&](int tile_column) {
      const int column = tile.column_tile * Shape::kColumns + tile_column;
      float* const dots =
          p.dots != nullptr ? p.dots + std::int64_t{column / kColumnsPerDot} * p.slots + tile.first : nullptr;
      return [&, dots, op = OutputOp(p, tile, column)](int row, const float4& y, const float4&) {
        const bool present = op.left > 0 && row < tile.rows;
        float dot = present ? op(row, y, table) : 0.0f;
        if (dots == nullptr) return;
        dot = device::lanes_sum<kLanes>(dot);
        if (present && threadIdx.x % kLanes == 0) dots[row] = dot;
      };
    });
  }
};

}  // namespace mfx::grouped
