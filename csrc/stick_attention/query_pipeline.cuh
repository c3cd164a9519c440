// The tiles of Q and dO that a block of keys walks, from the oldest to the newest, through a ring in shared memory.
#pragma once

#include "stick_attention/backward.cuh"

namespace mfx::stick {

// kStages stages of a tile of Q and, after it, one of dO. `Op` is what the products multiply.
template <typename Op, int kRowBytes, int kRows, int kStages, int kThreads>
class QueryPipeline {
 public:
  using T = typename Storage<Op>::Type;
  using Loader = TileLoader<T, kRowBytes, kThreads>;
  static constexpr int kTileBytes = kRows * kRowBytes;
  static constexpr int kBytes = kStages * 2 * kTileBytes;
  static constexpr int kWordBytes = kThreads / 32 * 4;  // what `live` takes

  // This warp multiplies 16 rows of a tile from `row` on with keys, and columns from byte `column` on over rows.
  __device__ QueryPipeline(device::SharedAddress ring, std::uint32_t* live, const Loader& loader,
                           const BackwardLaunch& launch, const Sequence& s, std::int64_t head, int row, int column)
      : launch_(launch),
        s_(s),
        loader_(loader),
        head_(head),
        ring_(ring),
        live_(live),
        q_(launch.params.problem.q, launch.params.problem.q_strides, launch.params.problem, s, head, 0),
        grad_o_(launch.params.grad_o, launch.params.grad_o_strides, launch.params.problem, s, head, 0),
        q_lane_(loader.lane(q_, launch.q_aligned)),
        grad_lane_(loader.lane(grad_o_, launch.grad_o_aligned)),
        easy_(q_lane_.step != 0 && grad_lane_.step != 0),
        rows_(device::a_rows<kRowBytes>(row * kRowBytes)),
        columns_(device::b_columns<Op, kRowBytes>(0) ^ column) {
    pin_if_16bit<T>(easy_, rows_, columns_);
  }

  // Operands in a stage: this warp's rows, and its columns from step `first` of the rows on.
  __device__ device::RowsA<kRowBytes, false> q(device::SharedAddress stage) const {
    return device::RowsA<kRowBytes, false>(stage + rows_);
  }
  __device__ device::RowsA<kRowBytes, false> grad_o(device::SharedAddress stage) const {
    return device::RowsA<kRowBytes, false>(stage + rows_ + kTileBytes);
  }
  template <typename First>
  __device__ device::SharedAddress q_columns(device::SharedAddress stage, First) const {
    return stage + columns_ + First::value * device::kStepElements<Op> * kRowBytes;
  }
  template <typename First>
  __device__ device::SharedAddress grad_o_columns(device::SharedAddress stage, First first) const {
    return q_columns(stage, first) + kTileBytes;
  }

  // Calls body(first row, stage) for the tiles that see `key`, the block's oldest, and that forward took to it: where
  // both are there for all, and the one after is on its way. Ends with a barrier.
  template <typename Body>
  __device__ void for_each_tile(int key, Body&& body) const {
    const int end_tile = (s_.rows + kRows - 1) / kRows;
    // Found kThreads at a time.
    for (int chunk = max(s_.first_row(launch_.params.problem, key), 0) / kRows; chunk < end_tile; chunk += kThreads) {
      LiveTiles tiles = find_live(chunk, end_tile, key);
      device::SharedAddress stage = ring_;
      std::uint32_t stages = 2 * ring_ + (kStages - 1) * 2 * kTileBytes;  // of the ring, added up
      device::pin_in_register(stages);
      int tile = tiles.next();
      if (kStages > 1 && tile < kThreads) copy(chunk + tile, stage);
      device::cp_async_commit();
      while (tile < kThreads) {
        const int following = tiles.next();
        if constexpr (kStages == 1) {
          __syncthreads();  // all are done with the tile before
          copy(chunk + tile, stage);
          device::cp_async_commit();
        }
        device::cp_async_wait<0>();
        __syncthreads();
        if constexpr (kStages > 1) {
          if (following < kThreads) copy(chunk + following, stages - stage);
          device::cp_async_commit();
        }
        std::uint32_t first_row = (chunk + tile) * kRows;
        device::hide_from_optimizer(first_row);  // computed once
        body(static_cast<int>(first_row), stage);
        if constexpr (kStages > 1) stage = stages - stage;
        tile = following;
      }
    }
    device::cp_async_wait_all();
    __syncthreads();
  }

 private:
  // The tiles of a chunk of kThreads that are wanted, a bit each.
  struct LiveTiles {
    const std::uint32_t* live;
    int words, at;
    std::uint32_t bits;

    // kThreads if there is none.
    __device__ int next() {
      while (bits == 0) {
        if (++at >= words) return kThreads;
        bits = live[at];
      }
      const int tile = 32 * at + __ffs(static_cast<int>(bits)) - 1;
      bits &= bits - 1;
      return tile;
    }
  };

  __device__ LiveTiles find_live(int chunk, int end_tile, int key) const {
    const int own = chunk + static_cast<int>(threadIdx.x);
    const bool alive = own < end_tile && first_visited_key(launch_, s_, head_, own * kRows) <= key;
    const std::uint32_t word = __ballot_sync(device::kAllLanes, alive);
    __syncthreads();  // nobody reads the words, the ring and what the body writes of the chunk before
    if ((threadIdx.x & 31) == 0) live_[threadIdx.x / 32] = word;
    __syncthreads();
    return {live_, (min(end_tile - chunk, kThreads) + 31) / 32, 0, live_[0]};
  }

  __device__ void copy(int tile, device::SharedAddress to) const {
    constexpr bool kOnce = device::kIs16Bit<T>;  // find it once: of 32-bit types fragments need the registers
    const auto q = kOnce ? q_lane_ : loader_.lane(q_, launch_.q_aligned);
    const auto grad = kOnce ? grad_lane_ : loader_.lane(grad_o_, launch_.grad_o_aligned);
    if (easy_ != 0 && (tile + 1) * kRows <= s_.rows) {
      loader_.template whole_rows<kRows>(to, q, tile);
      loader_.template whole_rows<kRows, kTileBytes>(to, grad, tile);
    } else {
      loader_.template rows<kRows>(to, q_, launch_.q_aligned, q, tile);
      loader_.template rows<kRows>(to + kTileBytes, grad_o_, launch_.grad_o_aligned, grad, tile);
    }
  }

  const BackwardLaunch& launch_;
  const Sequence& s_;
  const Loader& loader_;
  const std::int64_t head_;
  const device::SharedAddress ring_;
  std::uint32_t* const live_;
  const QRows<const T> q_, grad_o_;
  const typename Loader::Lane q_lane_, grad_lane_;
  std::int32_t easy_;                     // whether rows are found by adding a step
  device::SharedAddress rows_, columns_;  // this lane's, in a stage
};

}  // namespace mfx::stick
