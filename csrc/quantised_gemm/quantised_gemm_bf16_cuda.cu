#include "quantised_gemm/cuda_instances.cuh"

MFX_QUANTISED_INSTANCES(bf16, BFloat16)
