#include <ATen/Parallel.h>

#include "core/parallel.hpp"

namespace mfx {

int num_threads() {
  return at::get_num_threads();
}

void parallel_for(std::int64_t n, std::int64_t grain, FunctionRef<void(std::int64_t, std::int64_t)> f) {
  if (n > 0) at::parallel_for(0, n, grain, [&](std::int64_t begin, std::int64_t end) { f(begin, end); });
}

}  // namespace mfx
