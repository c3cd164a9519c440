#include "quantised_gemm/cuda_instances.cuh"

MFX_QUANTISED_INSTANCES(f16, Float16)
