// What the autograd halves of the bindings share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <string>
#include <vector>

namespace mfx {

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
inline bool requires_grad(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && requires_grad(*tensor);
}
inline bool requires_grad(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (requires_grad(tensor)) return true;
  }
  return false;
}

// Whether autograd has to record an op with these inputs (tensors, optional tensors, lists).
template <typename... Inputs>
bool records_grad(const Inputs&... inputs) {
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...);
}

// The results of a backward op as tensors that can be used, but whose own backward says that there is none.
inline std::vector<at::Tensor> refuse_double_backward(const std::string& op, std::vector<at::Tensor> gradients) {
  std::vector<at::Tensor> inputs;
  for (const at::Tensor& gradient : gradients) {
    inputs.push_back(gradient.defined() ? gradient.detach().requires_grad_() : gradient);
  }
  const auto error = c10::make_intrusive<torch::autograd::DelayedError>(
      op + ": double backward is not supported (the gradient of its gradient was asked for)",
      static_cast<int64_t>(inputs.size()));
  return (*error)(std::move(inputs));
}

}  // namespace mfx
