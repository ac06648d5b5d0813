#include "ops/cuda/device.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "ops/arguments.h"

namespace cnnkernels::cuda {
namespace {

[[maybe_unused]] const bool is_linked = has_cuda_kernels() = true;

}  // namespace

const DeviceLimits& limits_of(const at::Tensor& tensor) {
  constexpr size_t kMostDevices = 128;  // torch's own limit
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<DeviceLimits, kMostDevices> limits;
  const auto device = static_cast<size_t>(std::max<int>(0, tensor.device().index()));
  TORCH_CHECK(device < kMostDevices, "device ", tensor.device(), " has too large an index");
  std::call_once(asked[device], [&] {
    check_launch("device_limits", device_limits(static_cast<int>(device), &limits[device]));
  });
  return limits[device];
}

void check_launch(const char* op, Error error) {
  if (error == kSuccess) return;
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, error,
                              c10::str(op, ": ", error_name(error), ": ", error_text(error)));
}

}  // namespace cnnkernels::cuda
