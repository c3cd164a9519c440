// What stands between the two products of a gate network: gelu(z + b) for kMlp, z / |z| for kGmm, on a tile of rows.
#pragma once

#include <cmath>

#include "core/gelu.hpp"
#include "moduleformer_ext/route_topk.hpp"
#include "route_topk/route_topk_pack.hpp"

namespace mfx::MFX_ISA {

inline constexpr double kNormFloor = 1e-12;  // as torch.nn.functional.normalize

// f(column, lanes) over [0, n) in whole vectors and one partial one.
template <typename A, typename F>
inline void for_lanes(std::int64_t n, F f) {
  std::int64_t column = 0;
  for (; column + kWidth<A> <= n; column += kWidth<A>) f(column, kWidth<A>);
  if (column < n) f(column, static_cast<int>(n - column));
}
template <typename A>
inline Vec<A> load_lanes_of(const A* p, int lanes) {
  return lanes == kWidth<A> ? load(p) : load_partial(p, lanes);
}
template <typename A>
inline void store_lanes_of(A* p, Vec<A> v, int lanes) {
  if (lanes == kWidth<A>) {
    store(p, v);
  } else {
    store_partial(p, v, lanes);
  }
}

template <typename A>
inline A dot_row(const A* a, const A* b, std::int64_t n) {
  Vec<A> sum = {};
  for_lanes<A>(n, [&](std::int64_t i, int lanes) { sum += load_lanes_of(a + i, lanes) * load_lanes_of(b + i, lanes); });
  return reduce_add(sum);
}

// 1 / max(|z|, floor)
template <typename A>
inline A inverse_norm(const A* z, std::int64_t n) {
  return A{1} / std::max(std::sqrt(dot_row(z, z, n)), static_cast<A>(kNormFloor));
}

// z [count, ld] in place; what comes before the nonlinearity goes to saved [count, G] too, unless it is null.
template <typename A>
inline void activate(const RouterGateParams& network, std::int64_t count, A* z, std::int64_t ld, A* saved) {
  const std::int64_t n = network.hidden_dim;
  const A* bias = static_cast<const A*>(network.hidden_bias);
  for (std::int64_t i = 0; i < count; ++i, z += ld) {
    const A scale = network.gate == RouterGate::kGmm ? inverse_norm(z, n) : A{1};
    for_lanes<A>(n, [&](std::int64_t column, int lanes) {
      Vec<A> value = load_lanes_of(z + column, lanes);
      if (network.gate == RouterGate::kMlp) value += load_lanes_of(bias + column, lanes);
      if (saved != nullptr) store_lanes_of(saved + i * n + column, value, lanes);
      store_lanes_of(z + column, network.gate == RouterGate::kMlp ? gelu<A>(value) : value * scale, lanes);
    });
  }
}

}  // namespace mfx::MFX_ISA
