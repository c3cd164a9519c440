// What every op says to tensors that are not plain memory with strides.
#include "bindings/op.hpp"

#include <ATen/core/stack.h>

#include <algorithm>
#include <initializer_list>
#include <string>
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

// What Python's functions call an argument: schemas spell out layouts and quantised matrices, and routers share one.
std::string label(const std::string& argument, std::string_view gate) {
  const auto is_one_of = [&](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), argument) != names.end();
  };
  if (is_one_of({"offsets", "slot_order", "position"})) return "layout." + argument;
  if (is_one_of({"values", "scales"})) return "weight." + argument;
  if (gate == "logits" && argument == "x") return "logits";
  return gate == "gmm" && argument == "weight" ? "centroids" : argument;
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto value = [&](size_t i) -> const c10::IValue& { return torch::jit::peek(*stack, i, arguments.size()); };
  std::string name = op.schema().name(), gate;
  name.erase(0, name.find("::") + 2);
  for (const std::string_view pass : {"_forward", "_backward"}) {
    if (name.ends_with(pass)) name.resize(name.size() - pass.size());
  }
  if (name == "route_topk") {
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].name() == "gate") gate = value(i).toStringRef();
    }
    if (gate != "logits") name += "_" + gate;
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto check = [&](const at::Tensor& tensor) {
      const std::string kind = other_kind(tensor);
      MFX_CHECK_ARG(kind.empty(), name, label(arguments[i].name(), gate), "be a dense tensor with strides", kind);
    };
    if (value(i).isTensor()) check(value(i).toTensor());
    if (value(i).isTensorList()) {
      for (const at::Tensor& tensor : value(i).toTensorVector()) check(tensor);
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
