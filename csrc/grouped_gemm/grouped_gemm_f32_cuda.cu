#include "grouped_gemm/cuda_instances.cuh"

MFX_GROUPED_INSTANCES(f32, float)
