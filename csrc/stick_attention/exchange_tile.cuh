// Weights and score gradients on their way from the warps that scan rows to those that add up keys, in the dK/dV
// kernel.
#pragma once

#include "stick_attention/stick_break.cuh"
#include "stick_attention/tile_loader.cuh"

namespace mfx::stick {

// Two tiles [kRows, keys] of kRowBytes in natural order, weights and after them dS. A lane writes its run of keys;
// chunks of a row are exchanged so that the lanes of a store (two rows of four runs of 16 or 32 bytes, four rows of 8)
// and those of a load (eight rows of a chunk, four of two) hit all banks. A lane's addresses differ by XOR in the 128
// bytes that hold a chunk, else by immediate offsets.
template <typename Op, int kRows, int kRowBytes, int kSpan>
class ExchangeTile {
 public:
  using T = typename Storage<Op>::Type;
  static constexpr int kTileBytes = kRows * kRowBytes;
  static constexpr int kBytes = 2 * kTileBytes;

  // This warp scans 16 rows from `row` on and kSpan keys from `span` on, and adds up 16 keys from `key` on.
  __device__ ExchangeTile(device::SharedAddress tiles, int row, int span, int key)
      : tiles_(tiles),
        row_(row),
        span_(span),
        store_(store_lane<kSpan / 4>(tiles, row, span)),
        load_(load_lane(tiles, key)) {
    pin_if_16bit<T>(store_, load_);
  }

  // The runs of rows g and g + 8, of the oldest `width` tiles of 8 keys of the span.
  template <typename Width, int kTiles>
  __device__ void store(Width width, const LaneRuns<Op, kTiles>& weights,
                        const LaneRuns<Op, kTiles>& grad_scores) const {
    const device::SharedAddress to = width == kSpan / 8 ? store_ : store_lane<2 * width>(tiles_, row_, span_);
    store_runs<0, kTiles>(to, weights);
    store_runs<kTileBytes, kTiles>(to, grad_scores);
  }

  // The transposes as A operands: 16 keys, inner dimension `count` steps of rows from step `first` on.
  template <typename First, typename Count>
  __device__ device::OperandA<Count::value> weights(First first, Count) const {
    return load<0, First::value, Count::value>();
  }
  template <typename First, typename Count>
  __device__ device::OperandA<Count::value> grad_scores(First first, Count) const {
    return load<kTileBytes, First::value, Count::value>();
  }

 private:
  __device__ static constexpr std::uint32_t turned(std::uint32_t row) { return (row ^ row << 2) & 7; }
  __device__ static std::uint32_t offset(std::uint32_t row, std::uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ turned(row)) << 4);
  }

  // Where this lane stores its run of row g of 16 rows.
  template <int kRun>
  __device__ static device::SharedAddress store_lane(device::SharedAddress tiles, int first_row, int first_key) {
    constexpr int kElement = static_cast<int>(sizeof(Op));
    const int lane = threadIdx.x & 31, byte = (first_key + lane % 4 * kRun) * kElement;
    return tiles + offset(first_row + lane / 4, byte / 16) + byte % 16;
  }

  template <int kOffset, int kTiles>
  __device__ static void store_runs(device::SharedAddress to, const LaneRuns<Op, kTiles>& runs) {
    constexpr int kOfPair = sizeof(Op) / 2, kWords = kTiles * kOfPair;
    device::static_for<2>([&](auto half) {
      constexpr int kHalf = kOffset + half * 8 * kRowBytes;
      const auto word = [&](int i) { return runs[half][i / kOfPair].words[i % kOfPair]; };
      if constexpr (kWords == 2) {
        device::store_shared_64<kHalf>(to, {word(0), word(1)});
      } else {
        static_assert(kWords == 4 || kWords == 8, "at most two chunks, an even one first");
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          device::store_shared_128<kHalf>(to ^ (4 * i), {word(i), word(i + 1), word(i + 2), word(i + 3)});
        }
      }
    });
  }

  // Where this lane loads.
  __device__ static device::SharedAddress load_lane(device::SharedAddress tiles, int first_key) {
    const int lane = threadIdx.x & 31, chunk = first_key * static_cast<int>(sizeof(Op)) / 16;
    if constexpr (sizeof(Op) == 2) return tiles + offset((lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1));
    return tiles + offset(lane % 4 * 2, chunk + lane / 16) + lane / 4 % 4 * 4;
  }

  template <int kOffset, int kFirst, int kCount>
  __device__ device::OperandA<kCount> load() const {
    device::OperandA<kCount> a;
    device::static_for<kCount>([&](auto i) {
      constexpr int kStep = kFirst + i;
      if constexpr (sizeof(Op) == 2) {
        device::ldmatrix_x4_trans<kOffset + kStep * 16 * kRowBytes>(a.step[i], load_);
      } else {
        device::static_for<4>([&](auto j) {  // (key g or g + 8, row 2c or 2c + 1)
          constexpr std::uint32_t kBits = j % 2 * 32 ^ turned(j / 2) * 16;
          a.step[i][j] = device::load_shared_32<kOffset + (kStep * 8 + j / 2) * kRowBytes>(load_ ^ kBits);
        });
      }
    });
    return a;
  }

  const device::SharedAddress tiles_;
  const int row_, span_;
  device::SharedAddress store_, load_;  // this lane's
};

}  // namespace mfx::stick
