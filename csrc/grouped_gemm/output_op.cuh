// What becomes of four neighbouring columns of a product's row, in each form of the product. An object serves one lane
// in one tile: its columns are fixed, rows come one after the other.
#pragma once

#include "grouped_gemm/activation_grad.cuh"

namespace mfx::grouped {

// Positions `first` to `first + rows` of one expert, and columns from column_tile * kColumns on.
struct RowTile {
  int expert, first, rows, column_tile;
};

// What is known of each row of a tile, in shared memory.
struct alignas(16) RowOut {
  std::int64_t offset;  // bytes
  float gate;
};
template <int kRows>
struct RowTable {
  RowOut out[kRows];
  std::int64_t x[kRows];  // bytes
};

// out <- gate * y, at this lane's columns.
template <typename T, bool kAligned>
struct OutRows {
  const bool unrounded;
  char* const data;

  __device__ OutRows(const RowProductParams& p, int column)
      : unrounded(p.out_unrounded),
        data(p.out.data + std::int64_t{column} * static_cast<int>(p.out_unrounded ? sizeof(float) : sizeof(T))) {}

  __device__ void store(const RowOut& row, const float4& y, int left) const {
    if (unrounded) {
      store4<float, kAligned>(data + row.offset, row.gate * y, left);
    } else {
      store4<T, kAligned>(data + row.offset, row.gate * y, left);
    }
  }
};

template <typename T, bool kAligned>
struct PlainOp {
  const int left;  // columns that exist
  const OutRows<T, kAligned> out;

  __device__ PlainOp(const RowProductParams& p, const RowTile&, int column)
      : left(p.columns - column), out(p, column) {}

  template <typename Table>
  __device__ void operator()(int row, const float4& y, const float4&, const Table& table) const {
    out.store(table.out[row], y, left);
  }
};

// The bias of a tile's expert at this lane's columns, and at their partners'.
template <typename T, bool kFolded, bool kAligned>
struct Bias {
  const char* const data;  // or null
  const std::int64_t half_bytes;

  __device__ Bias(const RowProductParams& p, const RowTile& tile, int column)
      : data(p.bias == nullptr ? nullptr
                               : p.bias + (std::int64_t{tile.expert} * p.columns * (kFolded ? 2 : 1) + column) *
                                              static_cast<std::int64_t>(sizeof(T))),
        half_bytes(std::int64_t{p.columns} * sizeof(T)) {}

  __device__ void add(float4& y, float4& partner, int left) const {
    if (data == nullptr) return;
    y = y + load4<T, kAligned>(data, left);
    if (kFolded) partner = partner + load4<T, kAligned>(data + half_bytes, left);
  }
};

// y <- y + bias, out <- gate * activation(y), hidden <- y; y is (y, partner) and the activation gated if kFolded.
template <typename T, bool kFolded, bool kAligned>
struct ForwardOp {
  const int left;
  const Activation function;
  const OutRows<T, kAligned> out;
  const Bias<T, kFolded, kAligned> bias;
  char* const hidden;  // or null
  const std::int64_t half_bytes;

  __device__ ForwardOp(const RowProductParams& p, const RowTile& tile, int column)
      : left(p.columns - column),
        function(p.activation.function),
        out(p, column),
        bias(p, tile, column),
        hidden(p.hidden == nullptr ? nullptr
                                   : p.hidden + (std::int64_t{tile.first} * p.columns * (kFolded ? 2 : 1) + column) *
                                                    static_cast<std::int64_t>(sizeof(T))),
        half_bytes(std::int64_t{p.columns} * sizeof(T)) {}

  template <typename Table>
  __device__ void operator()(int row, float4 y, float4 partner, const Table& table) const {
    bias.add(y, partner, left);
    if (hidden != nullptr) {
      char* const to = hidden + row * (half_bytes * (kFolded ? 2 : 1));
      store4<T, kAligned>(to, y, left);
      if (kFolded) store4<T, kAligned>(to + half_bytes, partner, left);
    }
    y = activate_with_slope(function, y).value;
    if (kFolded) y = y * partner;
    out.store(table.out[row], y, left);
  }
};

// out <- gate * y, unless null; returns <y, x> where dots are wanted.
template <typename T, bool kAligned>
struct InputGradOp {
  const int left;
  const OutRows<T, kAligned> out;
  const bool wants_out;
  const char* const x;

  __device__ InputGradOp(const RowProductParams& p, const RowTile&, int column)
      : left(p.columns - column),
        out(p, column),
        wants_out(p.out.data != nullptr),
        x(p.dots == nullptr ? nullptr : p.x.data + std::int64_t{column} * sizeof(T)) {}

  template <typename Table>
  __device__ float operator()(int row, const float4& y, const Table& table) const {
    if (wants_out) out.store(table.out[row], y, left);
    return x != nullptr ? dot4(y, load4<T, kAligned>(x + table.x[row], left)) : 0.0f;
  }
};

// y is the gradient of gate * activation(h).
template <typename T, bool kAligned>
struct HiddenGradOp {
  const int left;
  const ActivationGradRows at;  // the tile's first row and the lane's column
  const std::int64_t half_bytes;

  __device__ HiddenGradOp(const RowProductParams& p, const RowTile& tile, int column)
      : left(p.columns - column),
        at(p.hidden_grad.template from<T>(tile.first, column)),
        half_bytes(std::int64_t{p.columns} * sizeof(T)) {}

  template <typename Table>
  __device__ float operator()(int row, const float4& y, const Table& table) const {
    return activation_grad4<T, kAligned>(at.template from<T>(row, 0), left, table.out[row].gate, y);
  }
};

}  // namespace mfx::grouped
