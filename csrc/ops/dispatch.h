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

// The elements to read: a tensor may have lost its storage.
inline const void* read_data(const at::Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  TORCH_CHECK(data != nullptr || tensor.numel() == 0, "a tensor of size ", tensor.sizes(),
              " has elements, but its data is not allocated");
  return data;
}

// Finds an operator of this library once, with its C++ signature.
template <class Signature>
auto typed_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkernels
