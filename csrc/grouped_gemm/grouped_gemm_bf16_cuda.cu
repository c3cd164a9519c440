#include "grouped_gemm/cuda_instances.cuh"

MFX_GROUPED_INSTANCES(bf16, BFloat16)
