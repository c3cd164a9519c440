// The tables of compiled kernels.
#pragma once

#include "grouped_gemm/cuda_instances.hpp"

namespace mfx::grouped {

Instances product_instances_quantised_8_bf16();
Instances product_instances_quantised_8_f16();
Instances product_instances_quantised_4_bf16();
Instances product_instances_quantised_4_f16();

}  // namespace mfx::grouped
