// The sum over the 32 lanes of a warp, which all lanes get. Lanes meet in five exchanges, in an
// order that does not change from run to run.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace cnnkernels::cuda {

template <class A>
__device__ inline A warp_sum(A value) {
  constexpr unsigned kWholeWarp = 0xffffffffu;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kWholeWarp, value, lanes);
  return value;
}

}  // namespace cnnkernels::cuda
