#include "grouped_gemm/hopper/instances.cuh"

MFX_HOPPER_INSTANCES(f16, Float16)
