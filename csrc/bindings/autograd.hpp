// What the ops' kernels for the Autograd key share: who asks for a gradient, and the refusals.
//
// Ops have a first derivative in reverse mode. Whatever else is asked of them raises NotImplementedError with the op's
// name, here and nowhere else: forward mode (torch.func.jvp, jacfwd, dual tensors), and the derivative of an op that is
// itself a derivative, by any of its inputs.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

#include "bindings/checks.hpp"

namespace mfx {

// Whether a predicate holds for one of the tensors in some arguments.
template <typename Predicate, typename... Arguments>
bool any_tensor(Predicate predicate, const Arguments&... arguments) {
  bool any = false;
  const auto visit = [&](const at::Tensor& tensor) { any = any || (tensor.defined() && predicate(tensor)); };
  (visit_tensors(visit, arguments), ...);
  return any;
}

// Whether autograd has to record an op with these inputs.
template <typename... Inputs>
bool records_grad(const Inputs&... inputs) {
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  return at::GradMode::is_enabled() && any_tensor(requires_grad, inputs...);
}

// Every differentiable input of an op: dual numbers must not pass through it and lose their tangents.
template <typename... Inputs>
void refuse_forward_mode(const char* op, const Inputs&... inputs) {
  const auto has_tangent = [](const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_tensor(has_tangent, inputs...), op,
      ": forward-mode differentiation (torch.func.jvp, jacfwd, dual tensors) is not implemented; reverse mode is");
}

// Some ops are for inference: asking for a gradient is a mistake to hear about, not to run into a detached result.
struct RefuseGradient {
  const char* op;
  const char* instead;  // what has a gradient

  template <typename Input>  // a tensor, an optional one, or a list
  void operator()(const char* argument, const Input& input) const {
    refuse_forward_mode(op, input);
    MFX_CHECK_ARG(!records_grad(input), op, argument,
                  c10::str("not require grad: this op has no backward. Use torch.no_grad(), or ", instead, " to train"),
                  "requires_grad=True");
  }
};

// The kernel of the Autograd key for ops that have no derivative of their own: X_backward, and X_forward where X is
// what one differentiates. For inputs that require grad their results do too, so that who differentiates them hears
// about it.
torch::CppFunction not_differentiable();

}  // namespace mfx
