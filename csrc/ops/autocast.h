// Casts to autocast's lower precision, as torch does for convolutions.
#pragma once

#include <ATen/autocast_mode.h>

#include <optional>

namespace cnnkernels {

// While it lives, autocast is off for the calls made; call it on each tensor.
class AutocastToLower {
 public:
  explicit AutocastToLower(c10::DeviceType device)
      : device_(device),
        dtype_(at::autocast::get_autocast_dtype(device)),
        guard_(at::autocast::get_autocast_dispatch_key_from_device_type(device)) {}

  at::Tensor operator()(const at::Tensor& tensor) const {
    return at::autocast::cached_cast(dtype_, tensor, device_);
  }
  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& tensor) const {
    return at::autocast::cached_cast(dtype_, tensor, device_);
  }

 private:
  c10::DeviceType device_;
  at::ScalarType dtype_;
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

}  // namespace cnnkernels
