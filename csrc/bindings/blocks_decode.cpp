#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "bindings/attention_layer_decode.hpp"
#include "bindings/autograd.hpp"
#include "bindings/ffn_layer_decode.hpp"
#include "bindings/layer_decode.hpp"
#include "bindings/op.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "blocks_decode";

// What all blocks have in common.
struct Common {
  std::string gate, order;
  int64_t attention_k, ffn_k;
  double attention_norm_epsilon, ffn_norm_epsilon;
  std::string activation;
};
// Of each block kFields: as many of the tensors as `sizes` says, none for what it does not have. `formats` has
// ExpertWeight's three numbers for each of its matrices of experts, zeros for segments.
struct Blocks {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> sizes, formats;
};
struct Caches {
  std::vector<at::Tensor> k_caches, v_caches, cache_lengths;
};
struct Args {
  at::Tensor x;
  Common common;
  Blocks blocks;
  Caches caches;
  OptionalTensor key_padding_mask;
  std::optional<double> stick_epsilon;
};

constexpr int64_t kRouterFields = 5;  // hidden_weight, hidden_bias, gate_weight, norm_weight, norm_bias
constexpr int64_t kFields = 2 * kRouterFields + 4 /* matrices of experts */ + 4 /* of keys and values */;
constexpr int64_t kFormat = 3, kFormats = 4 * kFormat;

struct Block {
  std::string op;  // what errors name
  AttentionLayerDecode::Args attention;
  FfnLayerDecode::Args ffn;
};

// Takes the fields of one block after the other.
class Reader {
 public:
  explicit Reader(const Args& a) : a_(a) {}

  std::vector<at::Tensor> list() {
    const auto begin = a_.blocks.tensors.begin() + tensor_;
    tensor_ += a_.blocks.sizes[static_cast<size_t>(field_++)];
    return {begin, a_.blocks.tensors.begin() + tensor_};
  }
  OptionalTensor optional(const char* op, const char* name) {
    const std::vector<at::Tensor> found = list();
    MFX_CHECK_ARG(found.size() <= 1, op, name, "be one tensor or none", found.size());
    return found.empty() ? std::nullopt : OptionalTensor(found[0]);
  }
  at::Tensor one(const char* op, const char* name) {
    const OptionalTensor found = optional(op, name);
    MFX_CHECK_ARG(found.has_value(), op, name, "be one tensor", "none");
    return *found;
  }
  LayerInput input(const char* op, int64_t k, double epsilon) {
    const Common& common = a_.common;
    const OptionalTensor hidden_weight = optional(op, "hidden_weight"), hidden_bias = optional(op, "hidden_bias");
    const std::vector<at::Tensor> gate_weight = list();
    const at::Tensor norm_weight = one(op, "norm_weight"), norm_bias = one(op, "norm_bias");
    return {
        {a_.x, common.gate, hidden_weight, hidden_bias, gate_weight}, k, common.order, norm_weight, norm_bias, epsilon};
  }
  ExpertWeight experts() {
    const auto begin = a_.blocks.formats.begin() + kFormat * format_++;
    return {list(), *begin == 0 ? std::vector<int64_t>() : std::vector<int64_t>(begin, begin + kFormat)};
  }

 private:
  const Args& a_;
  int64_t tensor_ = 0, field_ = 0, format_ = 0;
};

void check_lists(const Args& a) {
  const auto& [tensors, sizes, formats] = a.blocks;
  const auto count = static_cast<int64_t>(a.caches.k_caches.size());
  const auto has = [](const auto& list, int64_t size) { return static_cast<int64_t>(list.size()) == size; };
  MFX_CHECK_ARG(count >= 1, kOp, "k_caches", "be one for each of at least one block", "none");
  MFX_CHECK_ARG(has(sizes, count * kFields), kOp, "sizes",
                c10::str("be ", kFields, " numbers for each of ", count, " blocks"), sizes.size());
  int64_t total = 0;
  for (const int64_t size : sizes) {
    MFX_CHECK_ARG(size >= 0 && size <= static_cast<int64_t>(tensors.size()), kOp, "sizes", "be numbers of tensors",
                  size);
    total += size;
  }
  MFX_CHECK_ARG(has(tensors, total), kOp, "tensors", c10::str("be as many as sizes add up to, ", total),
                tensors.size());
  MFX_CHECK_ARG(has(formats, count * kFormats), kOp, "formats",
                c10::str("be ", kFormats, " numbers for each of ", count, " blocks"), formats.size());
  MFX_CHECK_ARG(a.caches.v_caches.empty() || has(a.caches.v_caches, count), kOp, "v_caches",
                c10::str("be one for each of ", count, " blocks, or none"), a.caches.v_caches.size());
  MFX_CHECK_ARG(has(a.caches.cache_lengths, count), kOp, "cache_lengths",
                c10::str("be one for each of ", count, " blocks"), a.caches.cache_lengths.size());
}

std::vector<Block> read_blocks(const Args& a) {
  check_lists(a);
  const auto& [k_caches, v_caches, lengths] = a.caches;
  Reader reader(a);
  std::vector<Block> blocks;
  blocks.reserve(k_caches.size());
  for (size_t i = 0; i < k_caches.size(); ++i) {
    Block& block = blocks.emplace_back();
    block.op = c10::str(kOp, ": block ", i);
    const char* const op = block.op.c_str();
    AttentionLayerDecode::Args& attention = block.attention;
    attention.input = reader.input(op, a.common.attention_k, a.common.attention_norm_epsilon);
    attention.query_weight = reader.experts();
    attention.output_weight = reader.experts();
    for (auto [part, name] : {std::pair(&Projections::k_weight, "k_weight"),
                              {&Projections::k_bias, "k_bias"},
                              {&Projections::v_weight, "v_weight"},
                              {&Projections::v_bias, "v_bias"}}) {
      attention.project.*part = reader.optional(op, name);
    }
    attention.cache = {k_caches[i], v_caches.empty() ? std::nullopt : OptionalTensor(v_caches[i]), lengths[i]};
    attention.key_padding_mask = a.key_padding_mask;
    attention.stick_epsilon = a.stick_epsilon;
    block.ffn.input = reader.input(op, a.common.ffn_k, a.common.ffn_norm_epsilon);
    block.ffn.up = reader.experts();
    block.ffn.down = reader.experts();
    block.ffn.activation = a.common.activation;
  }
  return blocks;
}

// All that can be wrong is found before a cache is written.
template <bool kMeta>
at::Tensor decode(const Args& a) {
  std::vector<Block> blocks = read_blocks(a);
  for (const Block& block : blocks) {
    AttentionLayerDecode::check(block.op.c_str(), block.attention);
    FfnLayerDecode::check(block.op.c_str(), block.ffn);
  }
  at::Tensor x = a.x;
  if constexpr (kMeta) return at::empty_symint(x.sym_sizes(), x.options());
  for (const Block& block : blocks) {
    AttentionLayerDecode::check_runnable(block.op.c_str(), block.attention);
    FfnLayerDecode::check_runnable(block.op.c_str(), block.ffn);
  }
  const auto step = [&]<typename Layer>(const std::string& op, typename Layer::Args& layer) {
    layer.input.network.x = x;
    LayerResults results(layer.input, false);
    Layer::decode(op.c_str(), layer, results);
    x = results.y;
  };
  for (Block& block : blocks) {
    step.template operator()<AttentionLayerDecode>(block.op, block.attention);
    step.template operator()<FfnLayerDecode>(block.op, block.ffn);
  }
  return x;
}

at::Tensor without_gradient(const Args& a) {
  const auto& [k_caches, v_caches, lengths] = a.caches;
  refuse_forward_mode(kOp, a.x, a.blocks.tensors, k_caches, v_caches);
  if (records_grad(a.x, a.blocks.tensors, k_caches, v_caches)) {
    for (const Block& block : read_blocks(a)) {
      const RefuseGradient refuse{block.op.c_str(), kOpsWithGradients};
      AttentionLayerDecode::refuse_gradients(block.attention, refuse);
      FfnLayerDecode::refuse_gradients(block.ffn, refuse);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<"blocks_decode", &decode<false>>(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  Definition(m,
             "blocks_decode(Tensor x, str gate, str order, int attention_k, int ffn_k, float attention_norm_epsilon, "
             "float ffn_norm_epsilon, str activation, Tensor[] tensors, int[] sizes, int[] formats, Tensor(a!)[] "
             "k_caches, Tensor(b!)[] v_caches, Tensor(c!)[] cache_lengths, Tensor? key_padding_mask, float? "
             "stick_epsilon) -> Tensor")
      .kernel<&decode<false>>({CPU, CUDA})
      .kernel<&decode<true>>({Meta})
      .kernel<&without_gradient>({Autograd});
}

}  // namespace mfx
