// An op's arguments, written once: a struct with what its schema lists, in that order. Members are values: at::Tensor,
// OptionalTensor, vectors of at::Tensor or int64_t, std::string, numbers, optionals of these, c10::List<bool>, or a
// struct of such members, which stand in its place. The op's kernels for every dispatch key take this struct; from its
// members this file makes the functions that torch registers and calls, and what autograd saves for backward.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/checks.hpp"

namespace mfx {

// Stands for a result that nobody asked for: ops return tensors of every kind, never undefined ones.
inline at::Tensor no_tensor(const at::Tensor& like) {
  return at::empty({0}, like.options());
}

// ---- The members of a struct ----

// Converts to the type of whatever it initialises.
struct Anything {
  template <typename T>
  operator T() const;
};

// As many as can be initialised, at most nine.
template <typename Struct, std::size_t kCount = 9>
consteval std::size_t count_members() {
  constexpr bool kFits = []<std::size_t... I>(std::index_sequence<I...>) {
    return requires { Struct{(static_cast<void>(I), Anything())...}; };
  }(std::make_index_sequence<kCount>());
  if constexpr (kFits) {
    return kCount;
  } else {
    return count_members<Struct, kCount - 1>();
  }
}

// References to them, as a tuple: what C++26 writes auto& [...all] = value.
template <typename T>
auto members(T& value) {
  if constexpr (!std::is_aggregate_v<T>) {
    return std::tie(value);
  } else {
    constexpr std::size_t n = count_members<std::remove_const_t<T>>();
    constexpr auto flat = [](auto&... each) { return std::tuple_cat(members(each)...); };
    // clang-format off
    if constexpr (n == 2) { auto& [a, b] = value; return flat(a, b); }
    if constexpr (n == 3) { auto& [a, b, c] = value; return flat(a, b, c); }
    if constexpr (n == 4) { auto& [a, b, c, d] = value; return flat(a, b, c, d); }
    if constexpr (n == 5) { auto& [a, b, c, d, e] = value; return flat(a, b, c, d, e); }
    if constexpr (n == 6) { auto& [a, b, c, d, e, f] = value; return flat(a, b, c, d, e, f); }
    if constexpr (n == 7) { auto& [a, b, c, d, e, f, g] = value; return flat(a, b, c, d, e, f, g); }
    if constexpr (n == 8) { auto& [a, b, c, d, e, f, g, h] = value; return flat(a, b, c, d, e, f, g, h); }
    if constexpr (n == 9) { auto& [a, b, c, d, e, f, g, h, i] = value; return flat(a, b, c, d, e, f, g, h, i); }
    // clang-format on
  }
}

// ---- Kernels: functions of the struct, as torch calls them ----

template <typename Function>
struct KernelTraits;
template <typename R, typename A>
struct KernelTraits<R (*)(A)> {
  using Result = R;
  using Args = std::remove_cvref_t<A>;
  using Members = decltype(members(std::declval<Args&>()));
};
template <auto kKernel>
using Traits = KernelTraits<decltype(kKernel)>;

// How a member is passed: the dispatcher looks at the tensors of a TensorList, not at those of a vector.
template <typename Member>
struct Passed {
  using Type = Member;
  static Member take(Member value) { return value; }
};
template <>
struct Passed<std::vector<at::Tensor>> {
  using Type = at::TensorList;
  static std::vector<at::Tensor> take(at::TensorList list) { return list.vec(); }
};
template <>
struct Passed<std::vector<int64_t>> {
  using Type = at::IntArrayRef;
  static std::vector<int64_t> take(at::IntArrayRef list) { return list.vec(); }
};

// The kernel as a function of the members, one by one.
template <auto kKernel, typename = typename Traits<kKernel>::Members>
struct Unboxed;
template <auto kKernel, typename... Member>
struct Unboxed<kKernel, std::tuple<Member&...>> {
  static typename Traits<kKernel>::Result call(typename Passed<Member>::Type... values) {
    typename Traits<kKernel>::Args args;
    members(args) = std::tuple<Member...>(Passed<Member>::take(std::move(values))...);
    return kKernel(std::move(args));
  }
};

template <std::size_t kSize>
struct OpName {
  char text[kSize];
  consteval OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};
template <std::size_t kSize, std::size_t kMore>
consteval auto operator+(const OpName<kSize>& name, const char (&more)[kMore]) {
  char text[kSize + kMore - 1];
  std::copy_n(more, kMore, std::copy_n(name.text, kSize - 1, text));
  return OpName(text);
}

// Calls an op, or an overload ("op.overload"), through the dispatcher; kKernel is any of its kernels.
template <OpName kName, auto kKernel>
typename Traits<kKernel>::Result call(const typename Traits<kKernel>::Args& args) {
  static const std::string name = std::string("moduleformer_ext::") + kName.text;
  static const std::size_t end = std::min(name.find('.'), name.size());
  static const std::string overload = name.substr(std::min(end + 1, name.size()));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(name.substr(0, end).c_str(), overload.c_str())
                             .template typed<decltype(Unboxed<kKernel>::call)>();
  return std::apply([](const auto&... member) { return op.call(member...); }, members(args));
}

// Registers what raises an error that names the argument, for sparse, quantized, nested tensors and the like.
void refuse_other_layouts(torch::Library& library, const char* op);

// Defines an op and registers its kernels: Definition(library, schema).kernel<&f>({CPU, CUDA}).kernel<&g>({Meta}).
class Definition {
 public:
  Definition(torch::Library& library, const std::string& schema)
      : library_(library), name_(schema.substr(0, schema.find('('))) {
    library.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
    refuse_other_layouts(library, name_.c_str());
  }
  template <auto kKernel>
  Definition& kernel(std::initializer_list<c10::DispatchKey> keys) {
    for (const c10::DispatchKey key : keys) library_.impl(name_.c_str(), key, &Unboxed<kKernel>::call);
    return *this;
  }
  Definition& kernel(c10::DispatchKey key, torch::CppFunction function) {
    library_.impl(name_.c_str(), key, std::move(function));
    return *this;
  }

 private:
  torch::Library& library_;
  const std::string name_;
};

// ---- Autograd ----

// Tensors, optional ones (undefined for none) and lists of them in one list.
template <typename... Tensors>
std::vector<at::Tensor> tensor_list(const Tensors&... tensors) {
  std::vector<at::Tensor> all;
  (visit_tensors([&](const at::Tensor& tensor) { all.push_back(tensor); }, tensors), ...);
  return all;
}

// Saves what backward needs: structs of arguments, and tensors.
template <typename... Parts>
void save_args(torch::autograd::AutogradContext* ctx, const Parts&... parts) {
  std::vector<at::Tensor> tensors;
  const auto save_value = [&](const c10::IValue& value) {
    ctx->saved_data[std::to_string(ctx->saved_data.size())] = value;
  };
  const auto save_member = [&]<typename Member>(const Member& member) {
    const auto append = [&](const at::Tensor& tensor) { tensors.push_back(tensor); };
    if constexpr (requires { visit_tensors(append, member); }) {
      visit_tensors(append, member);
      if constexpr (requires { member.size(); }) save_value(static_cast<int64_t>(member.size()));
    } else {
      save_value(member);
    }
  };
  std::apply([&](const auto&... member) { (save_member(member), ...); }, std::tuple_cat(members(parts)...));
  ctx->save_for_backward(std::move(tensors));
}

// The same parts; an optional tensor that was undefined comes back as none.
template <typename... Parts>
std::tuple<Parts...> saved_args(torch::autograd::AutogradContext* ctx) {
  const std::vector<at::Tensor> tensors = ctx->get_saved_variables();
  auto tensor = tensors.begin();
  int values = 0;
  const auto value = [&]() -> const c10::IValue& { return ctx->saved_data.at(std::to_string(values++)); };
  const auto restore = [&]<typename Member>(Member& member) {
    if constexpr (std::is_same_v<Member, at::Tensor>) {
      member = *tensor++;
    } else if constexpr (std::is_same_v<Member, OptionalTensor>) {
      member = if_defined(*tensor++);
    } else if constexpr (std::is_same_v<Member, std::vector<at::Tensor>>) {
      const auto end = tensor + value().toInt();
      member.assign(std::exchange(tensor, end), end);
    } else {
      member = value().template to<Member>();
    }
  };
  std::tuple<Parts...> parts;
  const auto all = std::apply([](auto&... part) { return std::tuple_cat(members(part)...); }, parts);
  std::apply([&](auto&... member) { (restore(member), ...); }, all);
  return parts;
}

// An autograd function is applied to the defined ones of its op's inputs, for these have edges, and to the struct.
template <typename Function, typename Args>
auto apply(const std::vector<at::Tensor>& inputs, const Args& args) {
  std::vector<at::Tensor> defined;
  for (const at::Tensor& input : inputs) {
    if (input.defined()) defined.push_back(input);
  }
  return Function::apply(at::TensorList(defined), args);
}

// Which of the inputs need their gradients; undefined ones do not.
inline c10::List<bool> needed_gradients(torch::autograd::AutogradContext* ctx, const std::vector<at::Tensor>& inputs) {
  c10::List<bool> needed;
  size_t edge = 0;
  for (const at::Tensor& input : inputs) needed.push_back(input.defined() && ctx->needs_input_grad(edge++));
  return needed;
}

// What the function's backward returns, of a gradient for each input.
inline std::vector<at::Tensor> gradients_of_defined(const std::vector<at::Tensor>& inputs,
                                                    const std::vector<at::Tensor>& gradients) {
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined()) result.push_back(gradients[i]);
  }
  result.emplace_back();  // of the struct
  return result;
}

// ---- Autocast ----

// Casts the tensors of an op that runs on x's device to the autocast type. While it lives, autocast is off.
class Autocast {
 public:
  explicit Autocast(const at::Tensor& x)
      : device_(x.device().type()), dtype_(at::autocast::get_autocast_dtype(device_)) {}

  void operator()(at::Tensor& tensor) const { cast(tensor, dtype_); }
  void operator()(OptionalTensor& tensor) const {
    if (tensor.has_value() && tensor->defined()) cast(*tensor, dtype_);
  }
  void operator()(std::vector<at::Tensor>& tensors) const {
    for (at::Tensor& tensor : tensors) cast(tensor, dtype_);
  }
  void cast(at::Tensor& tensor, at::ScalarType dtype) const {
    tensor = at::autocast::cached_cast(dtype, tensor, device_);
  }

 private:
  const c10::DeviceType device_;
  const at::ScalarType dtype_;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace mfx
