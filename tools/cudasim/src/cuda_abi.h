// The parts of the CUDA 13 runtime ABI the emulator exchanges with programs,
// declared here so that building it needs no CUDA toolkit.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
struct dim3 {
  unsigned x, y, z;
};
struct AbiDeviceProp {
  char name[256];
  char uuid[16];
  char luid[8];
  unsigned luidDeviceNodeMask;
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize;
  size_t memPitch;
  int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
  size_t totalConstMem;
  int major, minor;
  size_t textureAlignment, texturePitchAlignment;
  int multiProcessorCount, integrated, canMapHostMemory;
  int textureLimits[39];
  size_t surfaceAlignment;
  int concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, tccDriver, asyncEngineCount, unifiedAddressing,
      memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, maxThreadsPerMultiProcessor, streamPrioritiesSupported,
      globalL1CacheSupported, localL1CacheSupported;
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID, hostNativeAtomicSupported,
      pageableMemoryAccess, concurrentManagedAccess, computePreemptionSupported, canUseHostPointerForRegisteredMem,
      cooperativeLaunch;
  size_t sharedMemPerBlockOptin;
  int pageableMemoryAccessUsesHostPageTables, directManagedMemAccessFromHost, maxBlocksPerMultiProcessor,
      accessPolicyMaxWindowSize;
  size_t reservedSharedMemPerBlock;
  int hostRegisterSupported, sparseCudaArraySupported, hostRegisterReadOnlySupported, timelineSemaphoreInteropSupported,
      memoryPoolsSupported, gpuDirectRDMASupported;
  unsigned gpuDirectRDMAFlushWritesOptions;
  int gpuDirectRDMAWritesOrdering;
  unsigned memoryPoolSupportedHandleTypes;
  int deferredMappingCudaArraySupported, ipcEventSupported, clusterLaunch, unifiedFunctionPointers, deviceNumaConfig,
      deviceNumaId, mpsEnabled, hostNumaId;
  unsigned gpuPciDeviceID, gpuPciSubsystemID;
  int hostNumaMultinodeIpcSupported;
  int reserved[56];
};
static_assert(sizeof(AbiDeviceProp) == 1008, "cudaDeviceProp");
static_assert(offsetof(AbiDeviceProp, multiProcessorCount) == 384, "cudaDeviceProp");
static_assert(offsetof(AbiDeviceProp, sharedMemPerMultiprocessor) == 624, "cudaDeviceProp");
static_assert(offsetof(AbiDeviceProp, sharedMemPerBlockOptin) == 672, "cudaDeviceProp");
static_assert(offsetof(AbiDeviceProp, clusterLaunch) == 748, "cudaDeviceProp");
struct AbiFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes,
      preferredShmemCarveout, clusterDimMustBeSet, requiredClusterWidth, requiredClusterHeight, requiredClusterDepth,
      clusterSchedulingPolicyPreference, nonPortableClusterSizeAllowed;
  int reserved[16];
};
static_assert(sizeof(AbiFuncAttributes) == 144, "cudaFuncAttributes");
struct AbiLaunchAttribute {
  int id;
  char pad[4];
  union {
    char pad[64];
    int i;
    unsigned cluster[3];
  } val;
};
static_assert(sizeof(AbiLaunchAttribute) == 72, "cudaLaunchAttribute");
struct AbiLaunchConfig {
  dim3 grid, block;
  size_t dynamicSmem;
  void* stream;
  AbiLaunchAttribute* attrs;
  unsigned numAttrs;
};
static_assert(sizeof(AbiLaunchConfig) == 56, "cudaLaunchConfig_t");
struct AbiPointerAttributes {
  int type, device;
  void *devicePointer, *hostPointer;
  long reserved[8];
};
static_assert(sizeof(AbiPointerAttributes) == 88, "cudaPointerAttributes");
}

enum AbiError {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kInvalidSymbol = 13,
  kInvalidDevicePointer = 17,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kNoKernelImage = 209,
  kInvalidResourceHandle = 400,
  kSymbolNotFound = 500,
  kNotReady = 600,
  kLaunchOutOfResources = 701,
  kNotSupported = 801,
  kUnknown = 999,
};
