// What the operators' files share to reach the dispatcher.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace cnnkernels {

template <class... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

inline bool has_value(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

// Finds an operator of this library once, with its C++ signature.
template <class Signature>
auto typed_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkernels
