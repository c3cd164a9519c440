// Errors raised while loading or running device code.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace cudasim {

// Values of cudaError_t that faults map to.
enum FaultCode {
  kFaultInvalidPtx = 218,          // cudaErrorInvalidPtx
  kFaultIllegalAddress = 700,      // cudaErrorIllegalAddress
  kFaultAssert = 710,              // cudaErrorAssert
  kFaultIllegalInstruction = 715,  // cudaErrorIllegalInstruction
  kFaultMisaligned = 716,          // cudaErrorMisalignedAddress
  kFaultTrap = 719,                // cudaErrorLaunchFailure
  kFaultTimeout = 702,             // cudaErrorLaunchTimeout
};

struct Fault : std::runtime_error {
  int code;
  int lane = -1;         // lane within the warp, when one lane is to blame
  bool located = false;  // message already names kernel, block and line
  Fault(int code_, const std::string& what, int lane_ = -1) : std::runtime_error(what), code(code_), lane(lane_) {}
};

std::string format(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cudasim
