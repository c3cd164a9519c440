#include "core/dot_rows.hpp"
#include "core/scratch.hpp"
#include "moduleformer_ext/linear_decode.hpp"

namespace mfx::MFX_ISA {
namespace {

template <typename S>
void run(const LinearDecodeParams& p) {
  using A = Accumulate<S>;
  Scratch<A> x(p.num_rows * p.in), y(p.num_rows * p.out);
  convert(static_cast<const S*>(p.x), p.num_rows * p.in, x.data());
  const Rows weight = {p.out, p.in, p.dtype, 1, &p.weight, &p.out};
  multiply_few(p.num_rows, x.data(), weight, y.data(), p.out);
  for (std::int64_t row = 0; row < p.num_rows; ++row) {
    A* const sums = y.data() + row * p.out;
    if (p.bias != nullptr) {
      for_lanes<A>(p.out, [&](std::int64_t i, int lanes) {
        const Vec<A> bias = load_lanes_of(static_cast<const S*>(p.bias) + i, lanes);
        store_lanes_of(sums + i, load_lanes_of(sums + i, lanes) + bias, lanes);
      });
    }
    convert(sums, p.out, static_cast<S*>(p.y) + row * p.out);
  }
}

}  // namespace

Status linear_decode(const LinearDecodeParams& p) {
  with_dtype(p.dtype, [&](auto storage) { run<decltype(storage)>(p); });
  return {};
}

}  // namespace mfx::MFX_ISA
