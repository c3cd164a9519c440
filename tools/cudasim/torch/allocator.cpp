// A CPU allocator for torch that makes every tensor a device allocation of the emulator: registered with its exact
// size, poisoned with 0xff bytes (NaN in every float format, -1 in every integer one), forgotten when it is freed.
// Load it into a process that runs under ./run and call cudasim_use_torch_allocator() before tensors are made.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../cudasim.h"

namespace {

constexpr std::size_t kAlignment = 256;  // that of cudaMalloc

bool holding = false;
std::vector<void*> held;

void release(void* memory) {
  if (memory == nullptr) return;
  if (holding) {
    held.push_back(memory);
    return;
  }
  cudasim_unregister(memory);
  std::free(memory);
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* memory = nullptr;
    if (bytes > 0) {
      memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
      if (memory == nullptr) throw std::bad_alloc();
      std::memset(memory, 0xff, bytes);
      cudasim_register(memory, bytes, "tensor");
    }
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

}  // namespace

extern "C" {

void cudasim_use_torch_allocator() {
  static DeviceAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
}

// What tensors free while this is on stays where it is until cudasim_release_held(): the pool of a captured graph.
void cudasim_hold_freed(int on) {
  holding = on != 0;
}
void cudasim_release_held() {
  for (void* memory : held) {
    cudasim_unregister(memory);
    std::free(memory);
  }
  held.clear();
}

}  // extern "C"
