// Errors: what failed last, and its name.
#include <cstdio>
#include <map>

#include "runtime.h"

namespace cudasim {

thread_local int tlLastError = 0;
int g_pendingFault = 0;
std::string g_faultText;
int g_faultCode = 0;

int fail(int code) {
  tlLastError = code;
  return code;
}
void reportFault(const Fault& f) {
  g_faultText = f.what();
  g_faultCode = f.code;
  g_pendingFault = f.code;
  tlLastError = f.code;
  fprintf(stderr, "cudasim: %s\n", f.what());
}

namespace {

const std::map<int, std::pair<const char*, const char*>>& errorTable() {
  static const std::map<int, std::pair<const char*, const char*>> t = {
      {0, {"cudaSuccess", "no error"}},
      {1, {"cudaErrorInvalidValue", "invalid argument"}},
      {2, {"cudaErrorMemoryAllocation", "out of memory"}},
      {9, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
      {13, {"cudaErrorInvalidSymbol", "invalid device symbol"}},
      {17, {"cudaErrorInvalidDevicePointer", "invalid device pointer"}},
      {98, {"cudaErrorInvalidDeviceFunction", "invalid device function"}},
      {101, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
      {209, {"cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"}},
      {218, {"cudaErrorInvalidPtx", "a PTX JIT compilation failed"}},
      {400, {"cudaErrorInvalidResourceHandle", "invalid resource handle"}},
      {500, {"cudaErrorSymbolNotFound", "named symbol not found"}},
      {600, {"cudaErrorNotReady", "device not ready"}},
      {700, {"cudaErrorIllegalAddress", "an illegal memory access was encountered"}},
      {701, {"cudaErrorLaunchOutOfResources", "too many resources requested for launch"}},
      {702, {"cudaErrorLaunchTimeout", "the launch timed out and was terminated"}},
      {710, {"cudaErrorAssert", "device-side assert triggered"}},
      {715, {"cudaErrorIllegalInstruction", "an illegal instruction was encountered"}},
      {716, {"cudaErrorMisalignedAddress", "misaligned address"}},
      {719, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
      {801, {"cudaErrorNotSupported", "operation not supported"}},
      {999, {"cudaErrorUnknown", "unknown error"}}};
  return t;
}

}  // namespace
}  // namespace cudasim

using namespace cudasim;

extern "C" {

int cudaGetLastError() {
  int e = tlLastError ? tlLastError : g_pendingFault;
  tlLastError = 0;
  g_pendingFault = 0;
  return e;
}
int cudaPeekAtLastError() {
  return tlLastError ? tlLastError : g_pendingFault;
}
const char* cudaGetErrorString(int e) {
  auto it = errorTable().find(e);
  return it == errorTable().end() ? "unrecognized error code" : it->second.second;
}
const char* cudaGetErrorName(int e) {
  auto it = errorTable().find(e);
  return it == errorTable().end() ? "unrecognized error code" : it->second.first;
}

}  // extern "C"
