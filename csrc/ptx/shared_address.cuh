// Shared-memory addresses as the 32-bit integers that PTX instructions take.
#pragma once

#include <cstdint>

namespace mfx::device {

using SharedAddress = std::uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

}  // namespace mfx::device
