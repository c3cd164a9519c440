// What the CUDA library has compiled, for `moduleformer-ext info`. A launcher's file adds its kernels with a static
// KernelList, from the table that it chooses from where there is one.
#pragma once

#include "moduleformer_ext/common.hpp"

namespace mfx {

class KernelList {
 public:
  using List = void (*)(const char* op, KernelSink sink, void* context);

  KernelList(const char* op, List list) : op_(op), list_(list), next_(first_) { first_ = this; }
  KernelList(const KernelList&) = delete;

  static void for_each(KernelSink sink, void* context) {
    for (const KernelList* list = first_; list != nullptr; list = list->next_) list->list_(list->op_, sink, context);
  }

 private:
  const char* op_;
  List list_;
  const KernelList* next_;
  static inline const KernelList* first_ = nullptr;
};

// Adds kernels that one name stands for.
#define MFX_LIST_KERNELS(variable, op, arch, ...)                                                          \
  static const mfx::KernelList variable(op, [](const char* op_name, mfx::KernelSink sink, void* context) { \
    for (const char* name : {__VA_ARGS__}) sink(context, op_name, name, arch);                             \
  })

}  // namespace mfx
