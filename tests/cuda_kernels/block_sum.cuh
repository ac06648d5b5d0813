// The sum of an array by one block: shuffles inside of warps, shared memory between them. A kernel
// for the emulator's own tests, which break it.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace cuda_kernel_tests {

constexpr int kSumThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float warp_sum(float value) {
  for (int bits = 16; bits > 0; bits /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, bits);
  }
  return value;
}

// sums[r] is the sum of row r of rows x count numbers.
__global__ void __launch_bounds__(kSumThreads)
    row_sums_kernel(const float* rows, int row_count, int count, float* sums) {
  constexpr int kWarps = kSumThreads / 32;
  CNNK_SHARED(float, of_warps, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = 0; row < row_count; ++row) {
    float sum = 0;
    for (int i = thread; i < count; i += kSumThreads) {
      sum += rows[row * count + i];
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) of_warps[thread / 32] = sum;
    __syncthreads();  // all sums are written
    if (thread < 32) {
      sum = warp_sum(thread < kWarps ? of_warps[thread] : 0.0f);
      if (thread == 0) sums[row] = sum;
    }
    __syncthreads();  // all sums are read, and the next row may write
  }
}

}  // namespace cuda_kernel_tests
