#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.cuh"

namespace cnnkernels::cuda {
namespace {

// What is asked for its machine code: a device has that of all kernels or of none.
__global__ void probe_kernel() {}

// Of the current device. The code may be made of an older architecture's PTX, and then lacks what
// only later ones have: plans are to see that architecture.
cudaError_t find_kernels(int* compute_capability) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // it is told here, and not by the next launch
  if (error == cudaSuccess && attributes.ptxVersion < *compute_capability) {
    *compute_capability = attributes.ptxVersion;
  }
  return error;
}

}  // namespace

const char* error_name(Error error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

const char* error_text(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

Error device_limits(int device, DeviceLimits* limits) {
  int major = 0, minor = 0, shared_bytes = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, &limits->threads_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes},
  };
  for (const auto& query : queries) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return error;
  }
  limits->compute_capability = 10 * major + minor;
  limits->shared_bytes_per_block = shared_bytes;
  int current = device;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = find_kernels(&limits->compute_capability);
  cudaSetDevice(current);
  return error;
}

}  // namespace cnnkernels::cuda
