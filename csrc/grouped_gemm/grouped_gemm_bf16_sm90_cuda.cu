#include "grouped_gemm/hopper/instances.cuh"

MFX_HOPPER_INSTANCES(bf16, BFloat16)
