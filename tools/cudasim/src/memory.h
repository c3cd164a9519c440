// Device allocations and the helpers that device code needs from the host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace cudasim {

struct Warp;

void* deviceAlloc(size_t bytes);  // poisoned with 0xff
bool deviceFree(void* p);
// Ranges that may be accessed although cudaMalloc did not make them.
void registerRange(const void* p, size_t bytes, const std::string& name, bool byUser);
void unregisterRange(const void* p);
// Called when the program allocates device memory: it then means device pointers by device pointers.
void programAllocates();
bool strictMode();
struct RangeInfo {
  uint64_t base, size;
  std::string name;
  bool user;
};
bool findRange(uint64_t addr, RangeInfo& out);
std::string describeAddress(uint64_t addr, uint64_t bytes = 1);
uint64_t allocatedBytes();

int devicePrintf(Warp& w, int lane, uint64_t fmt, uint64_t args);

}  // namespace cudasim
