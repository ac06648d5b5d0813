// Convolution with few output pixels, each a product of its whole patch with the weights
// where they lie: forward, input gradient and weight gradient. See conv2d_patches.inl.
#pragma once

#include "kernels/conv2d.h"

namespace cnnkernels {

// The order in which a patch's elements lie among the weights of an output channel.
struct PatchOrder {
  bool dense;   // without gaps, in one of these orders
  bool planes;  // [channel][row][column], else [row][column][channel]
};
PatchOrder patch_order(const Conv2dProblem& problem);

void conv2d_patches_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const ThreadPool& pool, const void* input, const void* weight,
                            const void* bias, void* output);

void conv2d_patches_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* weight, void* grad_input);

void conv2d_patches_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                    const ThreadPool& pool, const void* grad_output,
                                    const void* input, void* grad_weight);

}  // namespace cnnkernels
