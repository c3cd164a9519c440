#include "bindings/autograd.hpp"

#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>
#include <string_view>
#include <vector>

#include "bindings/torch_compat.hpp"

namespace mfx {
namespace {

using torch::autograd::variable_list;

struct Refusal : torch::autograd::Error {
  using Error::Error;
  variable_list apply(variable_list&&) override { TORCH_CHECK_NOT_IMPLEMENTED(false, msg); }
};

// "moduleformer_ext::X_backward" -> "X: ...".
std::string message(const c10::OperatorHandle& op) {
  constexpr std::string_view kBackward = "_backward", kForward = "_forward";
  std::string name = op.operator_name().name.substr(op.operator_name().name.find("::") + 2);
  if (name.ends_with(kBackward)) {
    return name.substr(0, name.size() - kBackward.size()) + ": double backward is not implemented";
  }
  const std::string differentiable = name.substr(0, name.size() - kForward.size());
  return name + ": this op has no derivative; " + differentiable + " has";
}

template <typename Visit>
void visit_tensors(Visit&& visit, const c10::IValue& value) {
  if (value.isTensor()) return visit(value.toTensor());
  if (value.isTensorList()) mfx::visit_tensors(visit, value.toTensorVector());
}

void call_not_differentiable(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string text = message(op);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    visit_tensors([&](const at::Tensor& tensor) { inputs.push_back(tensor); }, argument);
  }
  refuse_forward_mode(text.substr(0, text.find(':')).c_str(), at::TensorList(inputs));
  NodePtr<Refusal> node;
  if (records_grad(at::TensorList(inputs))) {
    node = make_node<Refusal>(text, torch::autograd::collect_next_edges(inputs));
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  if (!node) return;
  for (const c10::IValue& result : torch::jit::last(*stack, op.schema().returns().size())) {
    const auto record = [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.is_floating_point()) torch::autograd::set_history(tensor, node);
    };
    visit_tensors(record, result);
  }
}

}  // namespace

torch::CppFunction not_differentiable() {
  return torch::CppFunction::makeFromBoxedFunction<&call_not_differentiable>();
}

}  // namespace mfx
