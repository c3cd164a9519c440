// What the files of the CUDA runtime share.
#pragma once
#include <string>

#include "cuda_abi.h"
#include "machine.h"

namespace cudasim {

extern thread_local int tlLastError;
extern int g_pendingFault;       // until cudaGetLastError
extern std::string g_faultText;  // of the last fault, see cudasim_last_fault
extern int g_faultCode;

int fail(int code);  // records and returns it
void reportFault(const Fault& f);
// Of the emulated architecture; shared memory per block with the opt-in.
struct DeviceLimits {
  uint32_t sharedPerBlock, sharedPerSm, threadsPerSm, blocksPerSm, multiprocessors;
};
const DeviceLimits& limits();
int multiprocessors();  // those of limits(), or as many as the configuration says
LaunchConfig makeConfig(const Kernel& k, dim3 g, dim3 b, size_t smem);
int launchKernel(Kernel& k, const LaunchConfig& c, void** args, int maxDynamic, bool nonPortable);

}  // namespace cudasim
