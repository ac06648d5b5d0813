#include "ops/cuda/device.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "ops/arguments.h"

namespace cnnkernels::cuda {
namespace {

const CudaDevice& known(const at::Device& device) {
  constexpr size_t kMostDevices = 128;  // torch's own limit
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<CudaDevice, kMostDevices> devices;
  const auto index = static_cast<size_t>(std::max<int>(0, device.index()));
  TORCH_CHECK(index < kMostDevices, "device ", device, " has too large an index");
  CudaDevice& of_index = devices[index];
  std::call_once(asked[index], [&] {
    DeviceLimits& limits = of_index.limits;
    const Error error = device_limits(static_cast<int>(index), &limits);
    if (error == kSuccess) return;
    of_index.reason = c10::str("the kernels do not run on device ", device,
                               " of compute capability ", limits.compute_capability / 10, ".",
                               limits.compute_capability % 10, " (", error_text(error), ")");
  });
  return of_index;
}

[[maybe_unused]] const bool is_linked = (cuda_device_of() = known) != nullptr;

}  // namespace

const DeviceLimits& limits_of(const at::Tensor& tensor) { return known(tensor.device()).limits; }

void check_launch(const char* op, Error error) {
  if (error == kSuccess) return;
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, error,
                              c10::str(op, ": ", error_name(error), ": ", error_text(error)));
}

}  // namespace cnnkernels::cuda
