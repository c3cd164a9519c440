// An attention layer's step, for the op of that name and for blocks_decode.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "bindings/autograd.hpp"
#include "bindings/checks.hpp"
#include "bindings/expert_weight.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"

namespace mfx {

// None of them where keys and values are the normed tokens themselves.
struct Projections {
  OptionalTensor k_weight, k_bias, v_weight, v_bias;
};
struct Cache {
  at::Tensor k_cache;  // [B, S_max, H, D_h]
  OptionalTensor v_cache;
  at::Tensor cache_lengths;
};

struct AttentionLayerDecode {
  static constexpr OpName kName{"attention_layer_decode"};

  struct Args {
    LayerInput input;
    ExpertWeight query_weight, output_weight;
    Projections project;
    Cache cache;
    OptionalTensor key_padding_mask;
    std::optional<double> stick_epsilon;
  };

  // `op` is what errors name.
  static void check(const char* op, const Args& a);
  // What shapes do not tell: whether the new tokens fit into the cache, and whether there are kernels for its device.
  static void check_runnable(const char* op, const Args& a);
  static void decode(const char* op, const Args& a, LayerResults& results);
  static void refuse_gradients(const Args& a, const RefuseGradient& refuse);
};

}  // namespace mfx
