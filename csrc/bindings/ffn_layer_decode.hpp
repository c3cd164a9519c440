// A feed-forward layer's step, for the op of that name and for blocks_decode.
#pragma once

#include <string>

#include "bindings/autograd.hpp"
#include "bindings/expert_weight.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"

namespace mfx {

struct FfnLayerDecode {
  static constexpr OpName kName{"ffn_layer_decode"};

  struct Args {
    LayerInput input;
    ExpertWeight up, down;
    std::string activation;
  };

  // `op` is what errors name.
  static void check(const char* op, const Args& a);
  static void check_runnable(const char* op, const Args& a);  // what shapes do not tell
  static void decode(const char* op, const Args& a, LayerResults& results);
  static void refuse_gradients(const Args& a, const RefuseGradient& refuse);
};

}  // namespace mfx
