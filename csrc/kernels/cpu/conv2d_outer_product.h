// Convolution by outer products: forward, input gradient and weight gradient.
// See conv2d_outer_product.inl for the idea.
#pragma once

#include "kernels/conv2d.h"

namespace cnnkernels {

// (Input channel, tap) pairs of a tile of the weight gradient, and channels of a block that
// it packs: with 2 vectors of 16 registers, or 4 of 32, they leave room for the operands.
constexpr int kTilePairs = 6;

// What one sum of the weight gradient goes over, before it is added to the totals:
// rows of an image, or whole images where they are small.
struct GradientSum {
  int64_t images, rows;
};
GradientSum gradient_sum(const Conv2dProblem& problem);
// Rows or columns of the input that the first sum packs: first, first + step, … (count of
// them); those outside of the image are its border.
struct GradientAxis {
  int64_t first, step, count;
};
GradientAxis gradient_source_rows(const Conv2dProblem& problem);
GradientAxis gradient_source_columns(const Conv2dProblem& problem);

// Slices of the sums that have totals of their own.
int64_t gradient_slices(const Conv2dProblem& problem);

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
