// How operands of wgmma lie in shared memory: in boxes, rows of 128 bytes whose chunks of 16 bytes are exchanged by XOR
// with the row as TMA's 128-byte swizzle does. By Major, a row of a box is
//   kK    a row (or column) of the result, 64 elements of its depth contiguous
//   kMN   an element of depth, 64 rows (or columns) of the result contiguous
// What a row of 128 bytes does not hold is in further boxes. PTX ISA, "Asynchronous warpgroup level matrix
// instructions", strides of matrix descriptors.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "tile/smem_tile.cuh"

namespace mfx::device {

inline constexpr int kBoxRowBytes = 128;

template <Major kMajor>
inline constexpr auto kGmmaMajor = kMajor == Major::kK ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;

// Of an operand that begins at `boxes`, boxes being kBoxBytes.
template <Major kMajor, int kBoxBytes>
__device__ inline std::uint64_t box_descriptor(SharedAddress boxes) {
  cute::GmmaDescriptor d;
  d.bitfield.start_address_ = static_cast<std::uint16_t>(boxes >> 4);
  d.bitfield.leading_byte_offset_ = kMajor == Major::kK ? 1 : kBoxBytes >> 4;  // from box to box
  d.bitfield.stride_byte_offset_ = 8 * kBoxRowBytes >> 4;                      // from eight rows to the next
  d.bitfield.layout_type_ = static_cast<std::uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return d;
}

// From an operand's beginning to its `step`th sixteen elements of depth: within rows and, after 64, in the next box; or
// as many rows.
template <Major kMajor, int kBoxBytes>
__host__ __device__ constexpr int step_bytes(int step) {
  return kMajor == Major::kK ? step % 4 * 32 + step / 4 * kBoxBytes : step * 16 * kBoxRowBytes;
}

}  // namespace mfx::device
