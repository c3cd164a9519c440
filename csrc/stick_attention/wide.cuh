// How operands are held for head dims above 256, up to 1024: there the accumulators of 16 rows do not fit into one
// warp, and the head dimension is split over the eight warps of a block, 128 columns each.
//
// A step works on 16 keys and 16 rows (32 in forward for 16-bit types). Each warp multiplies its own columns alone; the
// parts of S (and dP) meet in shared memory and are added up in a fixed order; each row is scanned once per block, by
// eight lanes with two neighbouring keys each; weights and score gradients go back through shared memory to all warps.
// Every byte of a tile is used by one warp, which copies it for itself: no barrier guards the tiles, two per step guard
// the exchange.
//
// These two barriers are why the kernels have bodies of their own: tiled ones go from product to product in registers,
// and need all keys of a tile where these need a part of S. Loaders, products, scan, mask and epilogue are the same.
#pragma once

#include "stick_attention/epilogue.cuh"
#include "stick_attention/kv_pipeline.cuh"
#include "stick_attention/mask.cuh"
#include "stick_attention/row_by_row.cuh"

namespace mfx::stick {

template <typename Op>
struct WideShape {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumns = 128;  // per warp
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(Op));
  static constexpr int kKeys = 16;
  static constexpr int kLanes = 8;                   // that scan a row
  static constexpr int kTileBytes = 16 * kRowBytes;  // a warp's columns of 16 rows or keys
  static constexpr int kTilesBytes = kWarps * 2 * kTileBytes;
  static constexpr int kPart = 16 * kKeys;                  // elements of a part of S for 16 rows
  static constexpr int kOperandBytes = kPart * sizeof(Op);  // weights or score gradients of 16 rows
};

// Rows in registers.
template <typename Op>
using WideRowsA = device::RowsA<WideShape<Op>::kRowBytes, true, sizeof(Op) == 4>;

// acc [16, 16] += A B^T over a warp's columns, the rows of B in its tile.
template <typename Op, typename LoadA>
__device__ inline void wide_gemm_abt(float (&acc)[2][4], LoadA&& a, device::SharedAddress tile) {
  constexpr int kRowBytes = WideShape<Op>::kRowBytes;
  device::gemm_abt<Op, kRowBytes>(acc, a, device::b_rows<kRowBytes>(tile));
}

// acc [16, 128] += A B, B a warp's tile.
template <typename Op, int kSteps>
__device__ inline void wide_gemm_ab(float (&acc)[WideShape<Op>::kColumnTiles][4], const device::OperandA<kSteps>& a,
                                    device::SharedAddress tile) {
  constexpr int kRowBytes = WideShape<Op>::kRowBytes;
  device::gemm_ab<Op, kRowBytes>(acc, a, device::b_columns<Op, kRowBytes>(tile));
}

// This warp's first column. What follows from it is computed where it is used: kept it would take registers all along.
__device__ inline int wide_column() {
  std::uint32_t thread = threadIdx.x;
  device::hide_from_optimizer(thread);
  return static_cast<int>(thread / 32) * 128;
}

// This warp's columns of the rows from `first_row` on.
template <typename T>
__device__ inline QRows<const T> wide_query_rows(const void* tensor, const StickQueryStrides& strides,
                                                 const StickAttentionProblem& p, const Sequence& s, std::int64_t head,
                                                 int first_row) {
  return {tensor, strides, p, s, head, first_row, wide_column()};
}

// This warp's columns of the keys from `first_key` on.
template <typename T>
__device__ inline KvRows<const T> wide_key_rows(const void* tensor, const StickKeyStrides& strides, const Sequence& s,
                                                std::int64_t head, int first_key) {
  return {tensor, strides, s, head, first_key, wide_column()};
}

// This warp's columns of sixteen rows into its tile.
template <typename Op, typename Rows>
__device__ inline void wide_load(device::SharedAddress tile, const StickAttentionProblem& p, const Rows& rows,
                                 bool aligned) {
  using T = typename Storage<Op>::Type;
  const TileLoader<T, WideShape<Op>::kRowBytes, 32> loader(p.head_dim - wide_column(), recomputed_lane());
  loader.template rows<16>(tile, rows, aligned);
  device::cp_async_commit();
}

// The same, and from there into registers; all copies of this warp are there then, and the tile is free.
template <typename Op, typename Rows>
__device__ inline WideRowsA<Op> wide_rows(device::SharedAddress tile, const StickAttentionProblem& p, const Rows& rows,
                                          bool aligned) {
  wide_load<Op>(tile, p, rows, aligned);
  device::cp_async_wait_all();
  __syncwarp();
  const WideRowsA<Op> a(device::a_rows<WideShape<Op>::kRowBytes>(tile));
  __syncwarp();
  return a;
}

// A warp's two tiles of the keys that its block walks, from the newest to the oldest: K and V, or, where K is V, this
// one and the next. With kTiles = 1 K is V, and there is no next. Products over keys read the columns of kColumns.
template <typename Op, KvColumns kColumns, int kTiles>
class WideKvPipeline {
 public:
  using T = typename Storage<Op>::Type;
  static constexpr int kKeys = WideShape<Op>::kKeys;

  // Starts with tile `newest`; takes no keys older than `begin`.
  __device__ WideKvPipeline(device::SharedAddress tiles, const StickAttentionProblem& p, const Sequence& s, int head,
                            int newest, int begin, bool k_aligned, bool v_aligned)
      : p_(p),
        s_(s),
        head_(head),
        begin_(begin),
        k_aligned_(k_aligned),
        v_aligned_(v_aligned),
        now_(tiles),
        other_(tiles + WideShape<Op>::kTileBytes) {
    copy_k(newest, now_);
    if (has_v()) copy_v(newest);
  }

  // Until what products over the head dimension read is there: in forward K, else K and V.
  __device__ void wait(int key_tile) {
    if (has_next()) copy_k(key_tile - 1, other_);
    if (has_next() || kColumns == KvColumns::kOfV) {
      device::cp_async_wait<1>();
    } else {
      device::cp_async_wait<0>();
    }
    __syncwarp();
  }
  __device__ device::SharedAddress k() const { return now_; }
  __device__ device::SharedAddress v() const { return has_v() ? other_ : now_; }

  // After these products: the older tile's on its way in the place of what the product over keys does not read.
  __device__ void rows_read(int key_tile) {
    __syncwarp();
    if (!has_v()) return;
    if constexpr (kColumns == KvColumns::kOfV) {
      copy_k(key_tile - 1, now_);
    } else {
      copy_v(key_tile - 1);
    }
  }

  // What the product over keys reads, when it is there.
  __device__ device::SharedAddress columns() const {
    if constexpr (kColumns == KvColumns::kOfK) return now_;
    device::cp_async_wait<1>();
    __syncwarp();
    return v();
  }

  // After that product.
  __device__ void columns_read(int key_tile) {
    __syncwarp();
    if (has_next()) {
      const device::SharedAddress used = now_;
      now_ = other_;
      other_ = used;
    } else if (kColumns == KvColumns::kOfV) {
      copy_v(key_tile - 1);
    } else {
      copy_k(key_tile - 1, now_);
    }
  }

 private:
  __device__ bool has_v() const { return kTiles == 2 && !p_.k_is_v; }
  __device__ bool has_next() const { return kTiles == 2 && p_.k_is_v; }

  // A group of copies, empty where the tile is not walked.
  __device__ void copy(device::SharedAddress to, const void* tensor, const StickKeyStrides& strides, int key_tile,
                       bool aligned) const {
    const int first = key_tile * kKeys;
    if (first >= begin_) {
      wide_load<Op>(to, p_, wide_key_rows<T>(tensor, strides, s_, head_, first), aligned);
    } else {
      device::cp_async_commit();
    }
  }
  __device__ void copy_k(int key_tile, device::SharedAddress to) const {
    copy(to, p_.k, p_.k_strides, key_tile, k_aligned_);
  }
  __device__ void copy_v(int key_tile) const { copy(other_, p_.v, p_.v_strides, key_tile, v_aligned_); }

  const StickAttentionProblem& p_;
  const Sequence& s_;
  const int head_, begin_;
  const bool k_aligned_, v_aligned_;
  device::SharedAddress now_, other_;
};

// Parts [16, 16] of kProducts products, of each of the eight warps.
template <typename Op, int kProducts>
class WideParts {
 public:
  static constexpr int kPart = WideShape<Op>::kPart;
  static constexpr int kBytes = WideShape<Op>::kWarps * kProducts * kPart * 4;

  __device__ explicit WideParts(float* parts) : parts_(parts) {}

  // This warp's part of a product, from fragments [rows, keys].
  __device__ void store(int product, const float (&acc)[2][4]) const {
    float* const part = own(product);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2 * 8 + lane / 4, key = i / 2 * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&part[index(row, key)]) =
          make_float2(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
    }
  }

  // The same from fragments of the transpose [keys, rows].
  __device__ void store_transposed(int product, const float (&acc)[2][4]) const {
    float* const part = own(product);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = i / 2 % 2 * 8 + lane / 4, row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      part[index(row, key)] = acc[i / 4][i % 4];
    }
  }

  // This lane's two keys of a row, all warps' parts added up.
  __device__ void sum(int product, int row, float (&sums)[1][2]) const {
    sums[0][0] = sums[0][1] = 0.0f;
#pragma unroll 2
    for (int warp = 0; warp < WideShape<Op>::kWarps; ++warp) {
      const float* const part = parts_ + (warp * kProducts + product) * kPart;
      const auto x = *reinterpret_cast<const float2*>(&part[index(row, 2 * (threadIdx.x & 7))]);
      sums[0][0] += x.x;
      sums[0][1] += x.y;
    }
  }

 private:
  __device__ float* own(int product) const { return parts_ + (threadIdx.x / 32 * kProducts + product) * kPart; }

  // Halves of every other pair of rows are exchanged, so that neither the fragments that write nor the eight lanes per
  // row that read meet a bank twice.
  __device__ static int index(int row, int key) { return row * 16 + (key ^ (row >> 1 & 1) << 3); }

  float* const parts_;
};

// A operands [rows, 16] in shared memory, in the order in which gemm_ab() takes inner elements, chunks of 16 bytes
// exchanged so that ldmatrix meets no bank twice.
template <typename Op>
class WideOperand {
 public:
  using T = typename Storage<Op>::Type;

  __device__ explicit WideOperand(std::uint8_t* rows) : rows_(rows) {}

  __device__ void put(int row, int inner, float x) const {
    *reinterpret_cast<T*>(rows_ + offset(row, inner)) = device::from_float<T>(x);
  }

  // A lane's two keys of a row.
  __device__ void put_run(int row, const float (&x)[1][2]) const {
    const int inner = 2 * (threadIdx.x & 7);
    if constexpr (sizeof(Op) == 2) {
      *reinterpret_cast<std::uint32_t*>(rows_ + offset(row, inner)) = device::pack_pair<Op>(x[0][0], x[0][1]);
    } else {
      put(row, inner, x[0][0]);
      put(row, inner + 1, x[0][1]);
    }
  }

  // Of the `sixteen`th 16 rows.
  __device__ device::OperandA<device::steps_of_tiles<Op>(2)> operator()(int sixteen = 0) const {
    const int lane = threadIdx.x & 31, row = lane & 15;
    device::OperandA<device::steps_of_tiles<Op>(2)> a;
#pragma unroll
    for (int step = 0; step < device::steps_of_tiles<Op>(2); ++step) {
      const int at = row * kOfRow + ((2 * step + (lane >> 4)) ^ turned(row)) * 16;
      device::ldmatrix_x4(a.step[step], device::shared_address(rows_) + sixteen * (16 * kOfRow) + at);
    }
    return a;
  }

 private:
  static constexpr int kOfRow = 16 * static_cast<int>(sizeof(Op));
  __device__ static int turned(int row) { return sizeof(Op) == 2 ? row >> 2 & 1 : row >> 1 & 3; }
  __device__ static int offset(int row, int inner) {
    constexpr int kOfChunk = 16 / static_cast<int>(sizeof(Op));
    const int at = sizeof(Op) == 2 ? inner : (inner & 8) + (inner & 1) * 4 + (inner >> 1 & 3);
    return row * kOfRow + (at / kOfChunk ^ turned(row)) * 16 + at % kOfChunk * static_cast<int>(sizeof(Op));
  }

  std::uint8_t* const rows_;
};

// The run state that a row has of a tile of keys.
__device__ inline RunState* wide_run_state(const BackwardLaunch& launch, const Sequence& s, std::int64_t head,
                                           int first_key, int row) {
  std::uint32_t first = first_key;
  device::hide_from_optimizer(first);  // what follows from it is computed here
  return launch.run_states + (first - launch.chunk_begin) / 16 * (launch.params.problem.heads * launch.rows) +
         workspace_row(launch, s, head, row);
}

}  // namespace mfx::stick
