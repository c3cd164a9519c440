#include <algorithm>
#include <limits>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "grouped_gemm/cuda_launches.hpp"
#include "grouped_gemm/pointwise_kernel.cuh"
#include "grouped_gemm/tensor_maps.hpp"

namespace mfx::grouped {
namespace {

Instances instances_of(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::kBFloat16: return product_instances_bf16();
    case DType::kFloat16: return product_instances_f16();
    case DType::kFloat32: return allow_tf32 ? product_instances_tf32() : product_instances_f32();
    case DType::kFloat64: break;
  }
  return {nullptr, 0};
}

Instances hopper_instances_of([[maybe_unused]] DType dtype) {
#ifdef MFX_SM90
  if (dtype == DType::kBFloat16) return product_instances_bf16_sm90a();
  if (dtype == DType::kFloat16) return product_instances_f16_sm90a();
#endif
  return {nullptr, 0};
}

const KernelList kListed("grouped_gemm", [](const char* op, KernelSink sink, void* context) {
  for (const Instances table :
       {product_instances_bf16(), product_instances_f16(), product_instances_f32(), product_instances_tf32(),
        hopper_instances_of(DType::kBFloat16), hopper_instances_of(DType::kFloat16)}) {
    for (int i = 0; i < table.count; ++i) sink(context, op, table.first[i].name, table.first[i].arch);
  }
});
MFX_LIST_KERNELS(kListedSteps, "grouped_gemm", 80, "combine", "scale", "activation_grad", "bias_dots", "bias_grad",
                 "sum_gate_grads");

constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();

bool multiple_of_16(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// f(element, aligned) with values of types that carry the choice.
template <typename F>
void dispatch(DType dtype, bool aligned, F f) {
  const auto with = [&](auto element) { aligned ? f(element, std::true_type{}) : f(element, std::false_type{}); };
  switch (dtype) {
    case DType::kBFloat16: return with(BFloat16{});
    case DType::kFloat16: return with(Float16{});
    case DType::kFloat32: return with(float{});
    case DType::kFloat64: break;  // has no CUDA kernels; the bindings refuse it
  }
}

}  // namespace

bool any(const RoutedMatrices& matrices, std::int64_t n) {
  return matrices.data != nullptr &&
         std::any_of(matrices.data, matrices.data + n, [](const void* matrix) { return matrix != nullptr; });
}

Launches::Launches(DType dtype, bool allow_tf32, const RoutedLayout& layout, Stream stream)
    : dtype_(dtype),
      instances_(instances_of(dtype, allow_tf32)),
      hopper_instances_(hopper_instances_of(dtype)),
      layout_(layout),
      stream_(stream) {
  require_at_most(kMaxInt, layout.num_slots(), "slots must number");
  if (status_.ok()) status_ = device_attribute(cudaDevAttrMultiProcessorCount, &processors_);
  if (status_.ok()) status_ = compute_capability(&capability_);
}

void Launches::require_at_most(std::int64_t most, std::int64_t got, const char* what) {
  if (got <= most || !status_.ok()) return;
  status_ = refusal(std::string(what) + " at most " + std::to_string(most) + " for the CUDA kernels, got " +
                    std::to_string(got));
}

RowMap Launches::map(const RoutedRows& rows, std::int64_t element_bytes) {
  const bool by_slot = rows.order != RowOrder::kExpert;
  const std::int64_t choices = by_slot ? layout_.num_choices : 1;
  const std::int64_t stride = rows.stride * element_bytes;
  const std::int64_t slot_stride = rows.order == RowOrder::kSlot ? rows.choice_stride * element_bytes : 0;
  const bool aligned = multiple_of_16(rows.data) && stride % 16 == 0 && slot_stride % 16 == 0;
  const std::int64_t unit = aligned ? std::int64_t{RowMap::kAlignedUnit} : element_bytes;
  const std::int64_t last =
      (by_slot ? layout_.num_tokens - 1 : layout_.num_slots() - 1) * stride + (choices - 1) * slot_stride;
  require_at_most(std::numeric_limits<std::uint32_t>::max(), last / unit,
                  "rows must lie within this many times 16 bytes, or elements where they are not aligned to 16 bytes:");
  return {static_cast<char*>(const_cast<void*>(rows.data)),
          static_cast<std::uint32_t>(unit),
          by_slot,
          static_cast<std::uint32_t>(slot_stride / unit),
          static_cast<std::uint32_t>((stride - choices * slot_stride) / unit),
          FastDivide(static_cast<std::uint32_t>(choices))};
}

RowMap Launches::map(void* data, RowOrder order, std::int64_t columns, std::int64_t element_bytes) {
  return map({data, order, order == RowOrder::kSlot ? layout_.num_choices * columns : columns, columns}, element_bytes);
}

void Launches::write_to(RowProductParams* product, void* out, RowOrder order, const void* gates, float* rows) {
  if (rows == nullptr) {
    product->out = map(out, order, product->columns);
    product->gates = static_cast<const float*>(gates);
    return;
  }
  product->out = map(rows, RowOrder::kExpert, product->columns, sizeof(float));
  product->out_unrounded = true;
}

void Launches::require_features(std::int64_t rows, std::int64_t columns) {
  require_at_most((1 << 28) - 1, std::max(rows, columns), "weight must have rows and columns of");
}

ExpertMatrices Launches::matrices(const RoutedMatrices& matrices, std::int64_t rows, std::int64_t columns) {
  ExpertMatrices result = {};
  result.transposed = matrices.transposed;
  result.row_bytes = matrices.stride * element_size(dtype_);
  result.matrix_bytes = matrices.expert_stride * element_size(dtype_);
  require_features(rows, columns);
  const char* expected = nullptr;  // where the next matrix of the current segment lies
  for (std::int64_t e = 0; e < layout_.num_experts; ++e) {
    const char* matrix = static_cast<const char*>(matrices.data[e]);
    if (result.count == 0 || matrix != expected) {
      require_at_most(ExpertMatrices::kMost, result.count + 1,
                      "weight must lie in runs of matrices at one distance, which must number");
      if (!status_.ok()) return result;
      result.append(matrix, e);
    }
    expected = matrix != nullptr ? matrix + result.matrix_bytes : nullptr;
  }
  return result;
}

bool Launches::aligned(const RowMap& map) const {
  return map.data == nullptr || map.unit == RowMap::kAlignedUnit;
}

bool Launches::aligned(const ExpertMatrices& matrices) const {
  // Segments of one matrix each have no distance between matrices.
  const bool at_multiples = matrices.count == layout_.num_experts || matrices.matrix_bytes % 16 == 0;
  return at_multiples && matrices.row_bytes % 16 == 0 &&
         std::all_of(matrices.data, matrices.data + matrices.count, multiple_of_16);
}

bool Launches::aligned(std::int64_t columns) const {
  return columns * element_size(dtype_) % 16 == 0;
}

bool Launches::aligned(const void* data, std::int64_t columns) const {
  return multiple_of_16(data) && aligned(columns);
}

const ProductInstance& Launches::choose(Product product, bool transposed, bool aligned, bool mapped) {
  // Hopper's tiles skip the half that an expert's rows do not reach: they serve small experts, too, but not the few
  // rows of decoding.
  if (aligned && mapped && rows_of_tile(product, aligned, layout_.num_slots(), layout_.num_experts) > 16) {
    const auto* chosen = choose_instance(hopper_instances_, product, transposed, 128, true, capability_);
    if (chosen != nullptr) return *chosen;
  }
  return choose_from(instances_, product, transposed, aligned);
}

const ProductInstance& Launches::choose_from(const Instances& table, Product product, bool transposed, bool aligned) {
  if (!aligned) slow_ = "rows of a tensor do not begin at multiples of 16 bytes and are read element by element";
  const int rows = rows_of_tile(product, aligned, layout_.num_slots(), layout_.num_experts);
  if (const auto* chosen = choose_instance(table, product, transposed, rows, aligned, capability_)) return *chosen;
  if (status_.ok()) {
    status_ = refusal("x must lie on a GPU of compute capability 8.0 or newer for the CUDA kernels, got " +
                      std::to_string(capability_ / 10) + "." + std::to_string(capability_ % 10));
  }
  return *table.first;  // nothing is launched any more
}

void Launches::launch_product(const ProductInstance& instance, std::int64_t blocks, const void* params) {
  if (!status_.ok()) return;
  void* arguments[] = {const_cast<void*>(params)};
  status_ = launch_kernel(instance.kernel, static_cast<unsigned>(blocks), instance.threads, instance.shared_bytes,
                          stream_, arguments);
}

// Blocks for `rows` warps, and no more than the device holds at a time.
int Launches::pointwise_blocks(std::int64_t rows) const {
  return static_cast<int>(
      std::min<std::int64_t>(ceil_div(rows * 32, kPointwiseThreads), processors_ * (2048 / kPointwiseThreads)));
}

void Launches::describe_layout(RowProductParams* params) const {
  params->offsets = layout_.offsets;
  params->num_experts = static_cast<std::int32_t>(layout_.num_experts);
  params->slot_order = layout_.slot_order;
  params->slots = static_cast<std::int32_t>(layout_.num_slots());
}

std::int64_t Launches::row_blocks(const ProductInstance& instance, std::int64_t columns) const {
  const std::int64_t slots = layout_.num_slots(), column_tiles = ceil_div(columns, instance.columns);
  const std::int64_t row_tiles = slots / instance.rows + std::min(slots, layout_.num_experts);  // at most
  return std::min<std::int64_t>(row_tiles * column_tiles, processors_ * instance.blocks_per_sm);
}

void Launches::forward_product(const Instances& table, RowProductParams* product, std::int64_t matrix_columns,
                               const void* params) {
  if (!status_.ok() || layout_.num_slots() == 0) return;
  describe_layout(product);
  const bool all_aligned = aligned(product->rows) && aligned(product->columns) && aligned(product->out);
  const ProductInstance& instance = choose_from(table, Product::kForward, /*transposed=*/false, all_aligned);
  launch_product(instance, row_blocks(instance, matrix_columns), params);
}

void Launches::row_product(Product product, RowProductParams params, void* grad_gates, const float* bias_dots) {
  const std::int64_t slots = layout_.num_slots();
  if (!status_.ok() || slots == 0) return;
  describe_layout(&params);
  const ActivationGradRows& hidden_grad = params.hidden_grad;
  // The columns themselves: the second half of gated matrices begins there, and rows of x may be longer.
  const bool all_aligned = aligned(params.rows) && aligned(params.matrices) && aligned(params.columns) &&
                           aligned(params.out) && aligned(params.x) && multiple_of_16(params.bias) &&
                           multiple_of_16(params.hidden) && multiple_of_16(hidden_grad.hidden) &&
                           multiple_of_16(hidden_grad.grad_hidden) && multiple_of_16(hidden_grad.gated);
  const std::int64_t folded = product == Product::kForward && params.activation.gated ? 2 : 1;
  // What memory holds rows of: the depth, or the result.
  const std::int64_t result = params.columns * folded;
  const bool rows_of_depth = (product == Product::kForward) != params.matrices.transposed;
  const std::int64_t rows = rows_of_depth ? params.depth : result, columns = rows_of_depth ? result : params.depth;
  const ProductInstance& instance =
      choose(product, params.matrices.transposed, all_aligned, has_maps(params.matrices, rows, columns));
  const std::int64_t blocks = row_blocks(instance, result);
  if (instance.arch < 90) {
    launch_product(instance, blocks, &params);
  } else {
    HopperRowProductParams mapped = {params, {}};
    if (status_.ok()) {
      status_ = encode_matrices(params.matrices, rows, columns, layout_.num_experts, dtype_, &mapped.matrices);
    }
    launch_product(instance, blocks, &mapped);
  }
  if (grad_gates == nullptr || !status_.ok()) return;
  const auto groups = static_cast<std::int32_t>(ceil_div(params.columns, instance.columns_per_dot));
  status_ = launch(sum_gate_grads, pointwise_blocks(ceil_div(slots, 32)), kPointwiseThreads, 0, stream_,
                   {bias_dots, params.dots, layout_.slot_order, static_cast<float*>(grad_gates), groups, params.slots});
}

void Launches::weight_grad(const RowMap& x, const RowMap& grad, const RoutedMatrices& grad_weight,
                           std::int64_t in_features, std::int64_t out_features) {
  if (grad_weight.transposed) return weight_grad(grad, x, grad_weight.transpose(), out_features, in_features);
  WeightGradParams params{layout_.offsets,
                          layout_.slot_order,
                          static_cast<std::int32_t>(layout_.num_experts),
                          static_cast<std::int32_t>(in_features),
                          static_cast<std::int32_t>(out_features),
                          x,
                          grad,
                          matrices(grad_weight, in_features, out_features)};
  const ProductInstance& instance =
      choose(Product::kWeightGrad, /*transposed=*/false, aligned(x) && aligned(grad) && aligned(params.grad_weight),
             /*mapped=*/true);
  const std::int64_t tiles =
      ceil_div(in_features, instance.rows) * ceil_div(out_features, instance.columns) * layout_.num_experts;
  require_at_most(kMaxInt, tiles, "weight must have tiles numbering");
  params.tiles = static_cast<std::int32_t>(tiles);
  const std::int64_t blocks = instance.arch < 90 ? tiles : std::min<std::int64_t>(tiles, processors_);
  if (tiles > 0) launch_product(instance, blocks, &params);
}

void Launches::combine(const float* rows, const void* gates, void* out, std::int64_t columns) {
  if (!status_.ok() || rows == nullptr || layout_.num_tokens == 0) return;
  const CombineParams params{rows,
                             layout_.position,
                             static_cast<const float*>(gates),
                             static_cast<char*>(out),
                             layout_.num_tokens,
                             static_cast<std::int32_t>(layout_.num_choices),
                             static_cast<std::int32_t>(columns)};
  dispatch(dtype_, multiple_of_16(rows) && aligned(out, columns), [&](auto element, auto aligned) {
    status_ = launch(grouped::combine<decltype(element), decltype(aligned)::value>,
                     pointwise_blocks(layout_.num_tokens), kPointwiseThreads, 0, stream_, params);
  });
}

void Launches::scale(const RowMap& x, const void* gates, char* to, std::int64_t columns) {
  const std::int64_t slots = layout_.num_slots();
  if (!status_.ok() || slots == 0) return;
  const ScaleParams params{x,
                           layout_.slot_order,
                           static_cast<const float*>(gates),
                           to,
                           static_cast<std::int32_t>(slots),
                           static_cast<std::int32_t>(columns)};
  dispatch(dtype_, aligned(x) && aligned(to, columns), [&](auto element, auto aligned) {
    status_ = launch(grouped::scale<decltype(element), decltype(aligned)::value>, pointwise_blocks(slots),
                     kPointwiseThreads, 0, stream_, params);
  });
}

void Launches::activation_grad(const ActivationGradRows& rows, const RowMap& grad, const void* gates,
                               void* grad_gates) {
  const std::int64_t slots = layout_.num_slots();
  if (!status_.ok() || slots == 0) return;
  const ActivationGradParams params{rows,
                                    grad,
                                    layout_.slot_order,
                                    static_cast<const float*>(gates),
                                    static_cast<float*>(grad_gates),
                                    static_cast<std::int32_t>(slots)};
  const bool all_aligned = aligned(grad) && aligned(rows.hidden, rows.columns) &&
                           aligned(rows.grad_hidden, rows.columns) && aligned(rows.gated, rows.columns);
  dispatch(dtype_, all_aligned, [&](auto element, auto aligned) {
    status_ = launch(grouped::activation_grad<decltype(element), decltype(aligned)::value>, pointwise_blocks(slots),
                     kPointwiseThreads, 0, stream_, params);
  });
}

void Launches::bias_dots(const RowMap& grad, const void* bias, float* to, std::int64_t columns) {
  const std::int64_t slots = layout_.num_slots();
  if (!status_.ok() || slots == 0 || to == nullptr) return;
  const BiasDotParams params{layout_.offsets,
                             layout_.slot_order,
                             static_cast<std::int32_t>(layout_.num_experts),
                             grad,
                             static_cast<const char*>(bias),
                             to,
                             static_cast<std::int32_t>(slots),
                             static_cast<std::int32_t>(columns)};
  dispatch(dtype_, aligned(grad) && aligned(bias, columns), [&](auto element, auto aligned) {
    status_ = launch(grouped::bias_dots<decltype(element), decltype(aligned)::value>, pointwise_blocks(slots),
                     kPointwiseThreads, 0, stream_, params);
  });
}

void Launches::bias_grad(const RowMap& grad, const void* gates, void* to, std::int64_t columns) {
  if (!status_.ok() || to == nullptr) return;
  const BiasGradParams params{layout_.offsets,
                              layout_.slot_order,
                              grad,
                              static_cast<const float*>(gates),
                              static_cast<char*>(to),
                              static_cast<std::int32_t>(columns)};
  const std::int64_t blocks = ceil_div(columns, 32 * kVector) * layout_.num_experts;
  require_at_most(kMaxInt, blocks, "bias must have pieces of 128 columns numbering");
  if (!status_.ok()) return;
  dispatch(dtype_, aligned(grad) && aligned(to, columns), [&](auto element, auto aligned) {
    status_ = launch(grouped::bias_grad<decltype(element), decltype(aligned)::value>, static_cast<unsigned>(blocks),
                     kPointwiseThreads, 0, stream_, params);
  });
}

}  // namespace mfx::grouped
