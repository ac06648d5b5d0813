// What the CUDA operators share: their device, its stream and its limits.
//
// Nothing here includes a header of CUDA's: torch's own interface for all devices gives the stream.
// With CNNK_EMULATE_CUDA the operators are the CPU's and their kernels those of the emulator, which
// is how they are tested without a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "kernels/cuda/device.h"
#include "ops/dispatch.h"

#ifdef CNNK_EMULATE_CUDA
#define CNNK_CUDA_DISPATCH_KEY CPU
#else
#define CNNK_CUDA_DISPATCH_KEY CUDA
#endif

namespace cnnkernels::cuda {

#ifdef CNNK_EMULATE_CUDA
constexpr c10::DeviceType kDeviceType = at::kCPU;
#else
constexpr c10::DeviceType kDeviceType = at::kCUDA;
#endif

// Makes a tensor's device the current one, and has torch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& tensor) : guard_(tensor.device()) {
#ifndef CNNK_EMULATE_CUDA
    const c10::impl::VirtualGuardImpl device(kDeviceType);
    stream_ = static_cast<Stream>(device.getStream(tensor.device()).native_handle());
#endif
  }
  Stream stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

// What templates over devices allocate by.
struct Allocation {
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format,
                          const at::Tensor& like) {
    return at::empty(size, like.options().dtype(dtype), format);
  }
};

// Of the tensor's device, which runs the kernels; asked for once.
const DeviceLimits& limits_of(const at::Tensor& tensor);

// Bytes of which the addresses of all tensors are multiples, of those that an access may ask for.
template <class... Tensors>
int64_t common_alignment(const Tensors&... tensors) {
  const uintptr_t bits =
      (uintptr_t{kVectorBytes} | ... |
       (tensors.defined() ? reinterpret_cast<uintptr_t>(read_data(tensors)) : 0));
  return static_cast<int64_t>(bits & (~bits + 1));
}

// Raises torch's error for a launch that failed.
void check_launch(const char* op, Error error);

}  // namespace cnnkernels::cuda
