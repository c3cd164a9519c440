// quantised_gemm's launcher.
#include "moduleformer_ext/quantised_gemm.hpp"

#include <algorithm>

#include "core/cuda_launch.hpp"
#include "core/kernel_list.hpp"
#include "grouped_gemm/cuda_launches.hpp"
#include "quantised_gemm/cuda_instances.hpp"
#include "quantised_gemm/product_kernel.cuh"

namespace mfx {
namespace {

using namespace grouped;

Instances quantised_instances(DType dtype, int bits) {
  if (dtype == DType::kBFloat16) {
    return bits == 8 ? product_instances_quantised_8_bf16() : product_instances_quantised_4_bf16();
  }
  return bits == 8 ? product_instances_quantised_8_f16() : product_instances_quantised_4_f16();
}

const KernelList kListed("quantised_gemm", [](const char* op, KernelSink sink, void* context) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int bits : {8, 4}) {
      const Instances table = quantised_instances(dtype, bits);
      for (int i = 0; i < table.count; ++i) sink(context, op, table.first[i].name, table.first[i].arch);
    }
  }
});

std::int64_t output_columns(const QuantisedGemmParams& p) {
  return p.activation.gated ? p.out_features / 2 : p.out_features;
}

struct Memory {
  float* rows = nullptr;  // before a token's are summed
  std::int64_t bytes;

  explicit Memory(const QuantisedGemmParams& p) {
    Workspace memory(p.workspace);
    if (sums_choices(p.layout, p.out_order)) rows = memory.take<float>(p.layout.num_slots() * output_columns(p));
    bytes = memory.bytes();
  }
};

}  // namespace

extern "C" {

std::int64_t mfx_quantised_gemm_cuda_workspace(const QuantisedGemmParams& params) {
  return Memory(params).bytes;
}

Status mfx_quantised_gemm_cuda(const QuantisedGemmParams& p, Stream stream) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return refusal("x must be bfloat16 or float16 for the CUDA kernels of quantised matrices, got another dtype");
  }
  const Memory memory(p);
  Launches launches(p.dtype, /*allow_tf32=*/false, p.layout, stream);
  launches.require_features(p.in_features, p.out_features);
  const std::int64_t columns = output_columns(p);
  const bool eight = p.weight.bits == 8;
  const std::int64_t groups = ceil_div(p.in_features, kQuantisedGroup);
  quantised::ProductParams params = {};
  RowProductParams& product = params.product;
  product.rows = launches.map(p.x);
  product.depth = static_cast<std::int32_t>(p.in_features);
  product.columns = static_cast<std::int32_t>(columns);
  product.activation = p.activation;
  launches.write_to(&product, p.out, p.out_order, p.gates, memory.rows);
  params.matrices = {reinterpret_cast<const char*>(p.weight.values), static_cast<const char*>(p.weight.scales),
                     static_cast<std::int32_t>(ceil_div(p.out_features, kQuantisedPanel)),
                     static_cast<std::int32_t>(eight ? p.in_features : groups * (kQuantisedGroup / 2)),
                     static_cast<std::int32_t>(eight ? 1 : groups)};
  launches.forward_product(quantised_instances(p.dtype, p.weight.bits), &product, p.out_features, &params);
  launches.combine(memory.rows, p.gates, p.out, columns);
  return launches.status();
}

}  // extern "C"

}  // namespace mfx
