// What the pooling kernels share on the device.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/max_pool2d_kernels.h"

namespace cnnkernels::cuda {

template <class A>
__device__ inline A minus_infinity() {
  return -static_cast<A>(HUGE_VALF);
}

// A maximum and the tap that it has come from. A later value wins if it is greater, or NaN.
template <class A>
struct Winner {
  A value;
  int tap;

  __device__ void challenge(A other, int other_tap) {
    if (other > value || other != other) {
      value = other;
      tap = other_tap;
    }
  }
};

// The tap that is saved for a window.
template <class A>
__device__ inline int saved_tap(const PoolGeometry& g, const Winner<A>& winner) {
  return g.clipped_tap != kWinnersTap && winner.value <= 0 ? g.clipped_tap : winner.tap;
}

// What a thread takes of images x pixels x channels (vectors of them, or strips for pixels), in a
// grid of make_grid: one pixel and channel, of every image from its first in steps.
struct Position {
  int64_t image, image_step;
  int pixel, channel;
};
__device__ inline Position thread_position() {
  return {int64_t{blockIdx.y} * blockDim.z + threadIdx.z, int64_t{gridDim.y} * blockDim.z,
          static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y),
          static_cast<int>(blockIdx.z * blockDim.x + threadIdx.x)};
}

}  // namespace cnnkernels::cuda
