// The tiles of K and V that a block walks, from the newest to the oldest, through a ring in shared memory.
#pragma once

#include "stick_attention/tile_loader.cuh"

namespace mfx::stick {

enum class KvColumns { kOfK, kOfV };

// kStages stages of a tile of K and, after it, one of V; where K is V, of K alone. `Op` is what the products multiply;
// those that sum over keys read the columns of kColumns.
template <typename Op, int kRowBytes, int kKeys, int kStages, int kThreads, KvColumns kColumns>
class KvPipeline {
 public:
  using T = typename Storage<Op>::Type;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kBytes = kStages * 2 * kTileBytes;
  static constexpr int kWidth = kKeys / 8;  // of a whole tile, in tiles of 8 keys
  // This lane's addresses, where registers last: not in the dQ kernel of 32-bit types.
  static constexpr bool kPinned = sizeof(T) == 2 || kColumns == KvColumns::kOfV;

  // Tile `newest` comes first.
  __device__ KvPipeline(device::SharedAddress ring, const TileLoader<T, kRowBytes, kThreads>& loader,
                        const StickAttentionProblem& p, const Sequence& s, std::int64_t head, int newest,
                        bool k_aligned, bool v_aligned)
      : loader_(loader),
        k_step_(loader.key_step(p.k_strides.token)),
        v_step_(loader.key_step(p.v_strides.token)),
        keys_(s.keys - newest * kKeys),
        k_is_v_(p.k_is_v),
        k_aligned_(k_aligned),
        v_aligned_(v_aligned),
        easy_(k_aligned && v_aligned && keys_ >= kKeys),
        values_(k_is_v_ ? 0 : kTileBytes),
        k_rows_(interleaved_rows<kRowBytes, kKeys / 4>(threadIdx.x & 31)),
        columns_(interleaved_columns<Op, kRowBytes, kKeys / 4>(threadIdx.x & 31) + first_column()),
        next_(ring),
        stages_(2 * ring + (kStages - 1) * 2 * kTileBytes) {
    const std::int64_t first = std::int64_t{newest} * kKeys;
    k_ = loader.template newest_key<kKeys>(kv_pointer<const T>(p.k, p.k_strides, s, head, first), p.k_strides.token);
    v_ = loader.template newest_key<kKeys>(kv_pointer<const T>(p.v, p.v_strides, s, head, first), p.v_strides.token);
    device::pin_in_register(k_);
    device::pin_in_register(v_);
    device::pin_in_register(stages_);
    pin_if_16bit<T>(k_step_, v_step_);
    if constexpr (kPinned) {
      device::pin_in_register(k_rows_);
      device::pin_in_register(columns_);
    }
  }

  // Starts the first copy, where there is a tile and a stage to spare.
  __device__ void prefetch(bool any) {
    if constexpr (kStages > 1) copy(next_, any);
  }

  // Until this thread's part of the next tile is there. A barrier makes it the block's, and the oldest stage free.
  __device__ void wait() const {
    if constexpr (kStages > 1) device::cp_async_wait<0>();
  }

  // The stage of the next tile; the one after it is on its way, where there is `more`.
  __device__ device::SharedAddress take(bool more) {
    const device::SharedAddress stage = next_;
    if constexpr (kStages > 1) {
      next_ = stages_ - stage;
      copy(next_, more);
    } else {
      copy(stage, true);
      device::cp_async_wait<0>();
      __syncthreads();
    }
    return stage;
  }

  // Where this lane reads the oldest `width` tiles of 8 keys of a stage: rows for products over the head dimension,
  // columns for products over keys.
  template <typename Width>
  __device__ device::SharedAddress k_rows(device::SharedAddress stage, Width width) const {
    return stage + (width == kWidth ? k_rows_ : interleaved_rows<kRowBytes, 2 * width>(recomputed_lane()));
  }
  template <typename Width>
  __device__ device::SharedAddress v_rows(device::SharedAddress stage, Width width) const {
    return k_rows(stage, width) + values_;
  }
  template <typename Width>
  __device__ device::SharedAddress columns(device::SharedAddress stage, Width width) const {
    if (width == kWidth) return stage + columns_;
    return stage + interleaved_columns<Op, kRowBytes, 2 * width>(recomputed_lane()) + first_column();
  }

 private:
  __device__ std::uint32_t first_column() const { return kColumns == KvColumns::kOfV ? values_ : 0; }

  // Copies the next tile, if it is wanted; a group of copies in any case.
  __device__ void copy(device::SharedAddress to, bool wanted) {
    if (wanted) {
      if (easy_) {
        loader_.template whole_keys<kKeys>(to, k_, k_step_);
        if (!k_is_v_) loader_.template whole_keys<kKeys, kTileBytes>(to, v_, v_step_);
      } else {
        loader_.template keys<kKeys>(to, k_, k_step_, keys_, k_aligned_);
        if (!k_is_v_) loader_.template keys<kKeys, kTileBytes>(to, v_, v_step_, keys_, v_aligned_);
        keys_ = kKeys;  // older tiles are whole
        easy_ = k_aligned_ && v_aligned_;
      }
    }
    device::cp_async_commit();
  }

  const TileLoader<T, kRowBytes, kThreads>& loader_;
  const std::uint8_t *k_, *v_;    // this thread's newest chunk of the next tile
  std::int64_t k_step_, v_step_;  // bytes from chunk to chunk
  int keys_;                      // from the next tile on
  const bool k_is_v_, k_aligned_, v_aligned_;
  bool easy_;
  const std::uint32_t values_;      // bytes from keys to values
  std::uint32_t k_rows_, columns_;  // this lane's, in a stage
  device::SharedAddress next_;      // stage of the next tile
  std::uint32_t stages_;            // of the ring, added up
};

// A tile of K and, after it, one of V that a block keeps, of which this warp multiplies kSpan keys from `span` on.
template <typename Op, int kRowBytes, int kKeys, int kSpan, int kThreads>
class KvTiles {
 public:
  using T = typename Storage<Op>::Type;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kBytes = 2 * kTileBytes;

  // Starts to copy the tiles.
  __device__ KvTiles(device::SharedAddress tiles, const TileLoader<T, kRowBytes, kThreads>& loader,
                     const StickAttentionProblem& p, const Sequence& s, std::int64_t head, int first_key, int span,
                     bool k_aligned, bool v_aligned)
      : span_(tiles + span * kRowBytes), rows_(span_ + interleaved_rows<kRowBytes, kSpan / 4>(threadIdx.x & 31)) {
    const auto copy = [&](device::SharedAddress to, const void* tensor, const StickKeyStrides& strides, bool aligned) {
      const std::int64_t step = loader.key_step(strides.token);
      const std::uint8_t* newest =
          loader.template newest_key<kKeys>(kv_pointer<const T>(tensor, strides, s, head, first_key), strides.token);
#pragma unroll
      for (int i = kKeys - kSpan; i >= 0; i -= kSpan) {
        loader.template keys<kSpan>(to + i * kRowBytes, newest, step, s.keys - first_key - i, aligned);
      }
    };
    copy(tiles, p.k, p.k_strides, k_aligned);
    copy(tiles + kTileBytes, p.v, p.v_strides, v_aligned);
    device::cp_async_commit();
    pin_if_16bit<T>(rows_);
  }

  // Where this lane reads the oldest `width` tiles of 8 keys of the span, for products over the head dimension.
  struct Rows {
    device::SharedAddress k, v;
  };
  template <typename Width>
  __device__ Rows rows(Width width) const {
    const device::SharedAddress k =
        width == kSpan / 8 ? rows_ : span_ + interleaved_rows<kRowBytes, 2 * width>(recomputed_lane());
    return {k, k + kTileBytes};
  }

 private:
  const device::SharedAddress span_;
  device::SharedAddress rows_;  // this lane's
};

}  // namespace mfx::stick
