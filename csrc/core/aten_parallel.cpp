#include <ATen/Parallel.h>

#include <atomic>

#include "core/parallel.hpp"

namespace mfx {

int num_threads() {
  return at::get_num_threads();
}

void parallel_for(std::int64_t n, std::int64_t grain, FunctionRef<void(std::int64_t, std::int64_t)> f) {
  if (n > 0) at::parallel_for(0, n, grain, [&](std::int64_t begin, std::int64_t end) { f(begin, end); });
}

void parallel_tasks(std::int64_t n, FunctionRef<void(std::int64_t)> f) {
  if (n <= 0) return;
  std::atomic<std::int64_t> next{0};
  const std::int64_t workers = std::min<std::int64_t>(n, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](std::int64_t, std::int64_t) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(task);
  });
}

}  // namespace mfx
