// What the operators' files share to reach the dispatcher.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_native.h>

#include <optional>

namespace cnnkernels {

template <class... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

inline bool has_value(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

// at::empty, but not through the dispatcher, which on small tensors costs more
// than the memory.
inline at::Tensor empty_cpu(at::IntArrayRef size, at::ScalarType dtype,
                            at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::native::empty_cpu(size, dtype, at::kStrided, at::kCPU, false, format);
}

// Finds an operator of this library once, with its C++ signature.
template <class Signature>
auto typed_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkernels
