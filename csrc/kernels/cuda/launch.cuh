// CUDA's names, for nvcc and for a host compiler alike. nvcc has them; a host compiler gets them
// from the emulator of the tests (docs/cuda-emulator.md), which runs the same source on the CPU.
#pragma once

#include "kernels/cuda/device.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

// An array in shared memory: static, and as large as the launch says (of which a kernel has one).
#define CNNK_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define CNNK_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char cnnk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(cnnk_dynamic_shared)
// The emulator checks what the hardware would trap on.
#define CNNK_CHECK_ALIGNMENT(pointer, bytes)
#else
#include "cuda_emulator.h"
#endif

namespace cnnkernels::cuda {

// Static shared memory of a kernel that has much dynamic.
constexpr int kMostStaticBytesBeside = 1024;

// Starts kernel(arguments...) on the stream, and returns what the launch returned.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const LaunchGrid& grid, int shared_bytes, Stream stream,
             const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kMostArgumentBytes,
                "more arguments than a kernel takes");
  const dim3 blocks(grid.x, grid.y, grid.z);
  const dim3 threads(grid.block_x, grid.block_y, grid.block_z);
  // What not every architecture has, a kernel has to ask for, its static arrays counted.
  if (shared_bytes > kSharedBytesOfAll - kMostStaticBytesBeside) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
#ifdef __CUDACC__
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), stream>>>(
      static_cast<Parameters>(arguments)...);
#else
  cuda_emulator::launch(blocks, threads, static_cast<size_t>(shared_bytes), stream,
                        [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
  return cudaGetLastError();
}

}  // namespace cnnkernels::cuda
