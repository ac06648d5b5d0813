// Winograd convolution F(2x2, 3x3): forward and input gradient of 3x3 kernels at
// stride 1. See conv2d_winograd.inl for the idea.
#pragma once

#include "kernels/conv2d.h"

namespace cnnkernels {

// One side of a pass. Images are dense in `layout`.
struct WinogradImages {
  DType dtype;
  Layout layout;
  int64_t channels, height, width;
};
// Strides in elements from element `at` of the weight; those of the kernel may be
// negative.
struct WinogradWeights {
  const void* data;
  int64_t at;
  int64_t from_step, to_step, row_step, column_step;
};

// Tiles of 2x2 results in one task.
int64_t winograd_tiles_per_task(int64_t from_channels, int64_t to_channels, int64_t tiles,
                                int threads);

// Both return false, with undefined results, if a result is not finite: it then needs
// another algorithm.
bool conv2d_winograd_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                             const ThreadPool& pool, const void* input, const void* weight,
                             const void* bias, void* output);

bool conv2d_winograd_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                    const ThreadPool& pool, const void* grad_output,
                                    const void* weight, void* grad_input);

}  // namespace cnnkernels
