// The CPU entry points of the fused block; see the .inl files for the ideas.
#pragma once

#include <algorithm>

#include "kernels/conv2d_relu_max_pool2d.h"

namespace cnnkernels {

void conv2d_relu_max_pool2d_direct_forward(const Conv2dReluMaxPool2dProblem& problem,
                                           const Conv2dReluMaxPool2dPlan& plan,
                                           const ThreadPool& pool, const void* input,
                                           const void* weight, const void* bias, void* output,
                                           void* argmax);

// Needs windows_are_quads.
void conv2d_relu_max_pool2d_outer_product_forward(const Conv2dReluMaxPool2dProblem& problem,
                                                  const Conv2dReluMaxPool2dPlan& plan,
                                                  const ThreadPool& pool, const void* input,
                                                  const void* weight, const void* bias,
                                                  void* output, void* argmax);

void conv2d_relu_max_pool2d_winners_backward(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                             const ThreadPool& pool, const void* grad_output,
                                             const void* input, const void* weight,
                                             const void* argmax, void* grad_input,
                                             void* grad_weight, void* grad_bias);

// The gradients of weight and bias, either of which may be null. Needs
// windows_are_quads.
void conv2d_relu_max_pool2d_window_gradient(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                            const ThreadPool& pool, const void* grad_output,
                                            const void* input, const void* argmax,
                                            void* grad_weight, void* grad_bias);

// All gradients, any of which may be null. Needs neighbourhoods_apply.
void conv2d_relu_max_pool2d_neighbourhoods_backward(const Conv2dReluMaxPool2dProblem& problem,
                                                    Isa isa, const ThreadPool& pool,
                                                    const void* grad_output, const void* input,
                                                    const void* weight, const void* argmax,
                                                    void* grad_input, void* grad_weight,
                                                    void* grad_bias);

// Elements of a row of the pixels that a window's four outputs read.
inline int64_t neighbourhood_length(const Conv2dProblem& conv) {
  return (conv.kernel_width + conv.stride_w) * conv.in_channels;
}

// Slices of the batch with totals of their own: the problem's, not the threads'.
inline int64_t window_gradient_slices(const Conv2dReluMaxPool2dProblem& problem) {
  return std::clamp<int64_t>(problem.conv.batch, 1, 16);
}

}  // namespace cnnkernels
