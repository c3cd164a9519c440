// What stands between the two products of a gate network: gelu(z + b) for kMlp, z / |z| for kGmm, on a tile of rows.
#pragma once

#include <cmath>

#include "core/gelu.hpp"
#include "moduleformer_ext/route_topk.hpp"
#include "route_topk/route_topk_pack.hpp"

namespace mfx::MFX_ISA {

template <typename A>
inline A dot_row(const A* a, const A* b, std::int64_t n) {
  Vec<A> sum = {};
  for_lanes<A>(n, [&](std::int64_t i, int lanes) { sum += load_lanes_of(a + i, lanes) * load_lanes_of(b + i, lanes); });
  return reduce_add(sum);
}

// 1 / max(|z|, floor)
template <typename A>
inline A inverse_norm(const A* z, std::int64_t n) {
  return A{1} / std::max(std::sqrt(dot_row(z, z, n)), static_cast<A>(kRouterNormFloor));
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
