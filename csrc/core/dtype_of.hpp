// Storage types and what params structs say of them.
#pragma once

#include <type_traits>

#include "moduleformer_ext/common.hpp"

namespace mfx {

// A pointer to elements T as params structs have it.
template <typename T>
using TensorPointer = std::conditional_t<std::is_const_v<T>, const void*, void*>;

template <typename T>
inline constexpr DType kDTypeOf = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;

}  // namespace mfx
