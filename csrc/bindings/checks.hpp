// Argument checks of the bindings. Every message reads "<op>: <argument> must <expectation>, got <value>".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

#include "moduleformer_ext/common.hpp"

#define MFX_CHECK_ARG(condition, op, argument, expectation, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, " must ", expectation, ", got ", __VA_ARGS__)

namespace mfx {

using OptionalTensor = std::optional<at::Tensor>;

// Undefined tensors stand for none where autograd keeps tensors and hands out gradients.
inline OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Calls visit(tensor) for what an argument holds: a tensor, an optional one (undefined for none), or a list of them.
template <typename Visit>
void visit_tensors(Visit&& visit, const at::Tensor& tensor) {
  visit(tensor);
}
template <typename Visit>
void visit_tensors(Visit&& visit, const OptionalTensor& tensor) {
  visit(tensor.value_or(at::Tensor()));
}
template <typename Visit>
void visit_tensors(Visit&& visit, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) visit(tensor);
}

// Turns a launcher's status into an exception.
inline void check_status(const char* op, const Status& status) {
  if (status.ok()) return;
  TORCH_CHECK_VALUE(status.index < 0, op, ": ", status.message, ", got ", status.got, " at index ", status.index);
  TORCH_CHECK_VALUE(false, op, ": ", status.message);
}

inline void check_scale(const char* op, std::optional<double> scale) {
  MFX_CHECK_ARG(!scale || std::isfinite(static_cast<float>(*scale)), op, "scale", "be finite in float32", *scale);
}

inline void check_dim(const char* op, const char* argument, const at::Tensor& tensor, int64_t dim) {
  MFX_CHECK_ARG(tensor.dim() == dim, op, argument, c10::str("have ", dim, " dimensions"), "shape ", tensor.sym_sizes());
}

inline void check_same_device(const char* op, const char* argument, const at::Tensor& tensor, const char* other_name,
                              const at::Tensor& other) {
  MFX_CHECK_ARG(tensor.device() == other.device(), op, argument,
                c10::str("be on the device of ", other_name, " (", other.device(), ")"), tensor.device());
}

inline void check_same_dtype(const char* op, const char* argument, const at::Tensor& tensor, const char* other_name,
                             const at::Tensor& other) {
  MFX_CHECK_ARG(tensor.scalar_type() == other.scalar_type(), op, argument,
                c10::str("have the dtype of ", other_name, " (", other.scalar_type(), ")"), tensor.scalar_type());
}

inline void check_dtype(const char* op, const char* argument, const at::Tensor& tensor, at::ScalarType dtype) {
  MFX_CHECK_ARG(tensor.scalar_type() == dtype, op, argument, c10::str("be ", dtype), tensor.scalar_type());
}

inline void check_shape(const char* op, const char* argument, const at::Tensor& tensor, at::SymIntArrayRef shape) {
  MFX_CHECK_ARG(tensor.sym_sizes() == shape, op, argument, c10::str("have shape ", shape), "shape ",
                tensor.sym_sizes());
}

// A tensor of which everything is known: one that another op returned, or a gradient of one.
inline void check_tensor(const char* op, const char* argument, const at::Tensor& tensor, at::SymIntArrayRef shape,
                         at::ScalarType dtype, const char* other_name, const at::Tensor& other) {
  check_shape(op, argument, tensor, shape);
  check_dtype(op, argument, tensor, dtype);
  check_same_device(op, argument, tensor, other_name, other);
}

// A matrix [out, in] for rows x [..., in], under the op's own names of the two.
inline void check_projection(const char* op, const char* argument, const at::Tensor& matrix, const char* out,
                             const char* in, const at::Tensor& x) {
  check_dim(op, argument, matrix, 2);
  check_same_dtype(op, argument, matrix, "x", x);
  check_same_device(op, argument, matrix, "x", x);
  MFX_CHECK_ARG(matrix.sym_size(1) == x.sym_size(-1), op, argument,
                c10::str("be [", out, ", ", in, "] with ", in, " = ", x.sym_size(-1), ", x's last dimension"), "shape ",
                matrix.sym_sizes());
}

// A vector of lengths or offsets.
inline void check_int32_vector(const char* op, const char* argument, const at::Tensor& tensor, const char* other_name,
                               const at::Tensor& other) {
  check_dim(op, argument, tensor, 1);
  MFX_CHECK_ARG(tensor.scalar_type() == at::kInt, op, argument, "be int32", tensor.scalar_type());
  check_same_device(op, argument, tensor, other_name, other);
}

// The type that sums over values of x are taken in and returned.
inline at::ScalarType result_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Every op computes in float32, float64, bfloat16 and float16.
inline DType check_float_dtype(const char* op, const char* argument, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: MFX_CHECK_ARG(false, op, argument, "be float32, float64, bfloat16 or float16", tensor.scalar_type());
  }
}

}  // namespace mfx
