// What differs between the releases of torch that the bindings compile against, 2.11 to 2.14, and nothing else.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <utility>

namespace mfx {

// A node of autograd's graph, owned as `set_history` takes it: torch 2.12 went from shared to intrusive pointers.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 12
template <typename Node>
using NodePtr = std::shared_ptr<Node>;

template <typename Node, typename... Args>
NodePtr<Node> make_node(Args&&... args) {
  return NodePtr<Node>(new Node(std::forward<Args>(args)...), torch::autograd::deleteNode);
}
#else
template <typename Node>
using NodePtr = c10::intrusive_ptr<Node>;

template <typename Node, typename... Args>
NodePtr<Node> make_node(Args&&... args) {
  return c10::make_intrusive<Node>(std::forward<Args>(args)...);
}
#endif

}  // namespace mfx
