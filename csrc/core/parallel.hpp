// Threads without a threading library in sight: torch's own pool behind two functions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace mfx {

// A non-owning reference to a callable, valid for the duration of the call it is passed to.
template <typename Signature>
class FunctionRef;
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(static_cast<Args&&>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, static_cast<Args&&>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

// f(begin, end) over a static partition of [0, n); ranges of fewer than `grain` items are not split.
void parallel_for(std::int64_t n, std::int64_t grain, FunctionRef<void(std::int64_t, std::int64_t)> f);

int num_threads();

// Of a thread, at least, where all it does is read: below this waking it costs more than it saves.
inline constexpr std::int64_t kParallelBytes = 1 << 18;

// How many threads are worth waking to read so much.
inline std::int64_t readers_of(std::int64_t bytes) {
  return std::clamp<std::int64_t>(bytes / kParallelBytes, 1, num_threads());
}

// f(task, state) for every task in [0, n), handed out one at a time in ascending order: for tasks of unequal cost. Each
// of at most so many workers makes one state.
template <typename Make, typename F>
void parallel_tasks_with(std::int64_t n, std::int64_t workers, Make&& make, F&& f) {
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min(n, workers), 1, [&](std::int64_t, std::int64_t) {
    auto state = make();
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(task, state);
  });
}

template <typename Make, typename F>
void parallel_tasks_with(std::int64_t n, Make&& make, F&& f) {
  parallel_tasks_with(n, num_threads(), make, f);
}

// f(task) likewise.
template <typename F>
void parallel_tasks(std::int64_t n, std::int64_t workers, F&& f) {
  parallel_tasks_with(n, workers, [] { return 0; }, [&](std::int64_t task, int) { f(task); });
}
template <typename F>
void parallel_tasks(std::int64_t n, F&& f) {
  parallel_tasks(n, num_threads(), f);
}

}  // namespace mfx
