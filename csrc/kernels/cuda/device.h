// A CUDA device as plans and callers see it. Host code: includes no header of CUDA's.
#pragma once

#include <cstdint>

struct CUstream_st;  // what a cudaStream_t points to

namespace cnnkernels::cuda {

using Stream = CUstream_st*;

// A cudaError_t. Launches return the error of the launch; what goes wrong on the device later is
// reported by the next call that waits for it, as with torch's own kernels.
using Error = int;
constexpr Error kSuccess = 0;

// "cudaErrorInvalidValue: invalid argument"; the text lives as long as the program.
const char* error_name(Error error);
const char* error_text(Error error);

// On what plans depend.
struct DeviceLimits {
  int compute_capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int threads_per_multiprocessor = 0;
  int64_t shared_bytes_per_block = 0;  // at most, for a kernel that asks for it
};

// What the architecture of a compute capability has, but for the number of multiprocessors, by
// which its devices differ. Reference: CUDA C++ Programming Guide, "Technical Specifications per
// Compute Capability". An unknown one has what all have.
DeviceLimits architecture_limits(int compute_capability);

// Reads the limits of a device, without waiting for it; an error where it does not run the kernels
// of this library, which may be built for other architectures.
Error device_limits(int device, DeviceLimits* limits);

// The shared memory of a block that every architecture has.
constexpr int kSharedBytesOfAll = 48 * 1024;

// How a kernel is launched. Grids are within what every architecture takes.
struct LaunchGrid {
  unsigned x = 1, y = 1, z = 1;
  unsigned block_x = 1, block_y = 1, block_z = 1;

  int64_t blocks() const { return int64_t{x} * y * z; }
  int threads() const { return static_cast<int>(block_x * block_y * block_z); }
};
constexpr int kVectorBytes = 16;  // the widest access of a thread
constexpr int64_t kMostBlocksX = 0x7fffffff;
constexpr int64_t kMostBlocksYZ = 65535;
constexpr int kMostThreadsZ = 64;

// The bytes of arguments that a kernel takes on every architecture from sm_70 on (CUDA 12.1).
constexpr int64_t kMostArgumentBytes = 32764;

}  // namespace cnnkernels::cuda
