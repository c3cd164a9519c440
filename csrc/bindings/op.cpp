// What every op says to tensors that are not plain memory with strides.
#include "bindings/op.hpp"

#include <ATen/core/stack.h>

#include <string_view>

namespace mfx {
namespace {

// What a tensor is instead; empty for those that the kernels read.
std::string other_kind(const at::Tensor& tensor) {
  if (!tensor.defined()) return "";
  if (tensor.is_nested()) return "a nested one";
  if (tensor.layout() != at::kStrided) return c10::str("layout ", tensor.layout());
  return tensor.is_quantized() ? c10::str("a quantized one (", tensor.scalar_type(), ")") : "";
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  std::string_view name = op.schema().name();
  name.remove_prefix(name.find("::") + 2);
  for (const std::string_view pass : {"_forward", "_backward"}) {
    if (name.ends_with(pass)) name.remove_suffix(pass.size());
  }
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    const auto check = [&](const at::Tensor& tensor) {
      const std::string kind = other_kind(tensor);
      MFX_CHECK_ARG(kind.empty(), name, arguments[i].name(), "be a dense tensor with strides", kind);
    };
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) check(tensor);
    }
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, ": has no kernel for tensors with the dispatch keys ", keys);
}

}  // namespace

void refuse_other_layouts(torch::Library& library, const char* op) {
  using enum c10::DispatchKey;
  for (const c10::DispatchKey key :
       {SparseCPU, SparseCUDA, SparseMeta, SparseCsrCPU, SparseCsrCUDA, SparseCsrMeta, MkldnnCPU, QuantizedCPU,
        QuantizedCUDA, QuantizedMeta, NestedTensorCPU, NestedTensorCUDA, NestedTensorMeta, AutogradNestedTensor}) {
    library.impl(op, key, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace mfx
