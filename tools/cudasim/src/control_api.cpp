// The control interface of cudasim.h and the environment variables.
#include "../cudasim.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "memory.h"
#include "module.h"
#include "runtime.h"

namespace cudasim {

Config& config() {
  static Config* c = [] {
    auto* x = new Config;
    auto num = [](const char* n, long long d) {
      const char* s = getenv(n);
      return s && *s ? atoll(s) : d;
    };
    x->arch = (int)num("CUDASIM_ARCH", 90);
    x->seed = (uint64_t)num("CUDASIM_SEED", 0);
    const char* ci = getenv("CI");  // set by test services: a report there must not go unnoticed
    x->race = (int)num("CUDASIM_RACE", ci && *ci && strcmp(ci, "0") && strcmp(ci, "false") ? 2 : 1);
    x->strict = (int)num("CUDASIM_STRICT", -1);
    x->uninit = num("CUDASIM_UNINIT", 0) != 0;
    x->verbose = num("CUDASIM_VERBOSE", 0) != 0;
    x->maxInstructions = (uint64_t)num("CUDASIM_MAX_INSTRUCTIONS", (long long)x->maxInstructions);
    x->slice = (int)std::max(1ll, num("CUDASIM_SLICE", x->slice));
    x->raceGlobal = num("CUDASIM_RACE_GLOBAL", 0) != 0;
    x->raceWarp = num("CUDASIM_RACE_WARP", 0) != 0;
    x->threads = (int)num("CUDASIM_THREADS", 1);
    x->tensorTruncate = num("CUDASIM_TENSOR_TRUNCATE", 1) != 0;
    x->multiprocessors = (int)num("CUDASIM_MULTIPROCESSORS", 0);
    x->approxError = num("CUDASIM_APPROX_ERROR", 0) != 0;
    if (const char* s = getenv("CUDASIM_STATS")) x->statsFile = s;
    return x;
  }();
  return *c;
}

}  // namespace cudasim

using namespace cudasim;

struct cudasim_module {
  std::unique_ptr<Module> m;
};

extern "C" {

void cudasim_register(const void* p, size_t n, const char* name) {
  registerRange(p, n, name ? name : "registered", true);
}
void cudasim_unregister(const void* p) {
  unregisterRange(p);
}
void* cudasim_malloc(size_t n) {
  return deviceAlloc(n);
}
void cudasim_free(void* p) {
  deviceFree(p);
}
const char* cudasim_stats_json(void) {
  static thread_local std::string s;
  s = allStatsJson();
  return s.c_str();
}
void cudasim_reset_stats(void) {
  resetStats();
}
const char* cudasim_last_fault(void) {
  return g_faultText.c_str();
}
int cudasim_last_fault_code(void) {
  return g_faultCode;
}
void cudasim_clear_fault(void) {
  g_faultText.clear();
  g_faultCode = g_pendingFault = tlLastError = 0;
}
uint64_t cudasim_race_count(void) {
  return raceCount();
}
void cudasim_reset_races(void) {
  resetRaces();
}
int cudasim_set_race_mode(int mode) {
  return std::exchange(config().race, mode);
}
int cudasim_set_uninit(int on) {
  return std::exchange(config().uninit, on != 0);
}
void cudasim_set_race_warp(int on) {
  config().raceWarp = on != 0;
}
const char* cudasim_last_report(void) {
  static thread_local std::string s;
  s = lastReport();
  return s.c_str();
}
void cudasim_set_strict(int mode) {
  config().strict = mode;
}
void cudasim_set_slice(int n) {
  config().slice = n < 1 ? 1 : n;
}
void cudasim_set_race_global(int on) {
  config().raceGlobal = on != 0;
}
int cudasim_set_tensor_truncate(int on) {
  return std::exchange(config().tensorTruncate, on != 0);
}
int cudasim_set_approx_error(int on) {
  return std::exchange(config().approxError, on != 0);
}
int cudasim_set_multiprocessors(int n) {
  return std::exchange(config().multiprocessors, n);
}
void cudasim_set_threads(int n) {
  config().threads = n;
}
void cudasim_set_seed(uint64_t seed) {
  config().seed = seed;
}

cudasim_module* cudasim_module_load(const char* ptx) {
  try {
    auto* m = new cudasim_module;
    m->m.reset(new Module(ptx));
    return m;
  } catch (Fault& f) {
    reportFault(f);
    return nullptr;
  }
}
void cudasim_module_unload(cudasim_module* m) {
  delete m;
}
static Kernel* moduleKernel(cudasim_module* m, const char* entry) {
  try {
    Kernel* k = m->m->kernel(entry);
    if (!k) reportFault(Fault(kInvalidDeviceFunction, std::string("no entry named ") + entry));
    return k;
  } catch (Fault& f) {
    reportFault(f);
    return nullptr;
  }
}
int cudasim_kernel_params(cudasim_module* m, const char* entry, uint32_t* sizes, int n) {
  Kernel* k = moduleKernel(m, entry);
  if (!k) return -1;
  for (int i = 0; i < n && i < (int)k->params.size(); i++) sizes[i] = k->params[i].size;
  return (int)k->params.size();
}
int cudasim_launch(cudasim_module* m, const char* entry, const uint32_t* grid, const uint32_t* block,
                   const uint32_t* cluster, uint32_t smem, void** args, int cooperative) {
  Kernel* k = moduleKernel(m, entry);
  if (!k) return g_faultCode;
  LaunchConfig c = makeConfig(*k, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, smem);
  if (cluster)
    for (int i = 0; i < 3; i++) c.cluster[i] = cluster[i];
  c.cooperative = cooperative;
  return launchKernel(*k, c, args, (int)limits().sharedPerBlock, true);
}
void* cudasim_module_symbol(cudasim_module* m, const char* name, size_t* bytes) {
  auto it = m->m->globals.find(name);
  if (it == m->m->globals.end()) return nullptr;
  if (bytes) *bytes = it->second.second;
  return it->second.first;
}

}  // extern "C"
