// linear_decode for the other ops of the bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include "bindings/checks.hpp"

namespace mfx {

// weight [out, in] and bias [out], or none, for rows x [..., in].
void check_linear(const char* op, const at::Tensor& x, const char* weight_name, const at::Tensor& weight,
                  const char* bias_name, const OptionalTensor& bias);

// x W^T + b of arguments that are checked and on the CPU.
at::Tensor linear_of_few(const char* op, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias);

}  // namespace mfx
