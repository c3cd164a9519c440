// Inner products of the 16 rows of x with those of y, row by row, spread over a warp as an mma A fragment is: lane (g,
// c) of a quad adds 16 bytes of rows g and g + 8 at a time, of any columns, of which the quad's four lanes have
// different ones. 16-bit elements go through the tensor cores: of the products of all rows with all rows the diagonal
// is wanted.
#pragma once

#include "tile/chunk.cuh"
#include "tile/operand.cuh"
#include "tile/warp_reduce.cuh"

namespace mfx::device {

template <typename T>
class RowProducts {
 public:
  __device__ void add(const uint4 (&x)[2], const uint4 (&y)[2]) {
    if constexpr (kIs16Bit<T>) {
      const std::uint32_t a[2][4] = {{x[0].x, x[1].x, x[0].y, x[1].y}, {x[0].z, x[1].z, x[0].w, x[1].w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_step<T>(acc_[half], a[0], y[half].x, y[half].y);
        multiply_step<T>(acc_[half], a[1], y[half].z, y[half].w);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float own[4], other[4];
        unpack_chunk<T>(x[half], own);
        unpack_chunk<T>(y[half], other);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[half][i] += own[i] * other[i];
      }
    }
  }

  // Of row g + 8 half, in all lanes of the quad.
  __device__ float operator()(int half) const {
    if constexpr (kIs16Bit<T>) {
      const int lane = threadIdx.x & 31, g = lane / 4;
      const float own = g % 2 == 0 ? acc_[half][2 * half] : acc_[half][2 * half + 1];
      return of_lane(own, g * 4 + g / 2);
    } else {
      return lanes_sum<kQuad>((acc_[half][0] + acc_[half][1]) + (acc_[half][2] + acc_[half][3]));
    }
  }

 private:
  // Of 16-bit elements an mma accumulator per half of the rows of y, else sums of every fourth product.
  float acc_[2][4] = {};
};

}  // namespace mfx::device
