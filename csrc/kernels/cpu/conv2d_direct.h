// Direct convolution on packed planes: forward and input gradient. See
// conv2d_direct.inl for the idea.
#pragma once

#include "kernels/conv2d.h"
#include "kernels/cpu/packed_planes.h"

namespace cnnkernels {

// The layout of packed input planes for a forward pass whose horizontal phases
// are `phases` (a multiple of the stride).
PackedPlanes packed_input(const Conv2dProblem& problem, int64_t phases);

// The taps of the forward pass on such planes, row by row of the kernel, for
// weights with these strides and outputs whose input starts at `first_column`
// of a group of phases.
std::vector<Tap> forward_taps(const Conv2dProblem& problem, const PackedPlanes& packed,
                              int64_t weight_stride_r, int64_t weight_stride_s,
                              int64_t first_column = 0);

// Strides of an activation of `channels` x `height` x `width` in a layout.
PlaneSource plane_source(Layout layout, int64_t channels, int64_t height, int64_t width);

// Elements from one image to the next.
inline int64_t image_stride(int64_t channels, int64_t height, int64_t width) {
  return channels * height * width;
}

void conv2d_direct_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const ThreadPool& pool, const void* input, const void* weight,
                           const void* bias, void* output);

void conv2d_direct_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                  const ThreadPool& pool, const void* grad_output,
                                  const void* weight, void* grad_input);

void conv2d_direct_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* input, void* grad_weight);

void conv2d_bias_gradient(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                          const void* grad_output, void* grad_bias);

}  // namespace cnnkernels
