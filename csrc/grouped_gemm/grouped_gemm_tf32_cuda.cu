#include "grouped_gemm/cuda_instances.cuh"

MFX_GROUPED_INSTANCES(tf32, device::Tf32)
