#include "kernels/cuda/device.h"

namespace cnnkernels::cuda {

DeviceLimits architecture_limits(int compute_capability) {
  DeviceLimits limits;
  limits.compute_capability = compute_capability;
  switch (compute_capability) {
    case 75:
      limits.threads_per_multiprocessor = 1024;
      limits.shared_bytes_per_block = 64 * 1024;
      break;
    case 80:
    case 87:
      limits.threads_per_multiprocessor = compute_capability == 80 ? 2048 : 1536;
      limits.shared_bytes_per_block = 163 * 1024;
      break;
    case 90:
    case 100:
    case 103:
      limits.threads_per_multiprocessor = 2048;
      limits.shared_bytes_per_block = 227 * 1024;
      break;
    case 86:
    case 89:
    case 120:
    case 121:
      limits.threads_per_multiprocessor = 1536;
      limits.shared_bytes_per_block = 99 * 1024;
      break;
    default:
      limits.threads_per_multiprocessor = 1024;
      limits.shared_bytes_per_block = kSharedBytesOfAll;
  }
  return limits;
}

}  // namespace cnnkernels::cuda
