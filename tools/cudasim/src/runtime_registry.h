// The kernels and variables that nvcc-generated code registers.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "module.h"
#include "runtime.h"

namespace cudasim {

struct FatbinHandle {
  const void* wrapper = nullptr;
  std::unique_ptr<Module> module;
  bool loaded = false;
  std::string error;
};
struct HostFunction {
  FatbinHandle* fatbin;
  std::string name;
  Kernel* kernel = nullptr;
  int maxDynamic = -1;  // with the static part 48 KiB, unless cudaFuncSetAttribute says otherwise
  bool nonPortable = false;
};
struct HostVar {
  FatbinHandle* fatbin;
  std::string name;
  size_t size;
};

struct State {
  std::recursive_mutex mutex;
  std::map<const void*, HostFunction> functions;
  std::map<const void*, HostVar> vars;
};
State& state();
HostFunction* findFunction(const void* f);
Kernel* kernelOf(HostFunction& f);  // null after a fault, which is reported
uint8_t* symbolAddress(const void* sym, size_t* size);

}  // namespace cudasim
