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

// The elements to read or to write: a tensor may have lost its storage.
template <class Data>
Data* allocated(const at::Tensor& tensor, Data* data) {
  TORCH_CHECK(data != nullptr || tensor.numel() == 0, "a tensor of size ", tensor.sizes(),
              " has elements, but its data is not allocated");
  return data;
}
inline const void* read_data(const at::Tensor& tensor) {
  return allocated(tensor, tensor.const_data_ptr());
}
inline void* written_data(const at::Tensor& tensor) {
  return allocated(tensor, tensor.mutable_data_ptr());
}

// Finds an operator of this library once, with its C++ signature.
template <class Signature>
auto typed_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkernels
