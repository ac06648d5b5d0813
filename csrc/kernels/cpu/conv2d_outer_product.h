// Convolution by outer products: forward, input gradient and weight gradient.
// See conv2d_outer_product.inl for the idea.
#pragma once

#include "kernels/conv2d.h"

namespace cnnkernels {

void conv2d_outer_product_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                  const ThreadPool& pool, const void* input, const void* weight,
                                  const void* bias, void* output);

void conv2d_outer_product_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                         const ThreadPool& pool, const void* grad_output,
                                         const void* weight, void* grad_input);

void conv2d_outer_product_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                          const ThreadPool& pool, const void* grad_output,
                                          const void* input, void* grad_weight);

}  // namespace cnnkernels
