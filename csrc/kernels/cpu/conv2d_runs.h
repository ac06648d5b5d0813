// The weight gradient of convolution in channels_last, both operands read where they lie.
// See conv2d_runs_weight_gradient.inl for the idea.
#pragma once

#include "kernels/conv2d.h"

namespace cnnkernels {

// How the products of a weight gradient are cut up. Vectors lie along the channels of one
// operand, and the other's run of elements for a kernel row is broadcast.
struct GradientRuns {
  bool input_vectors;  // vectors lie along the input channels, the gradient's are broadcast
  int64_t vector_channels, run;
  // Rows of pixels: those of the outputs, or, where pixels follow one another without a gap in
  // both operands, of any length.
  int64_t images, rows, columns, pixels;
  int64_t block_rows, block_columns;  // what one chain of products goes over
  int64_t slices;                     // of the blocks of rows, each with totals of its own
  int64_t blocks() const { return images * ceil_div(rows, block_rows); }
};
GradientRuns gradient_runs(const Conv2dProblem& problem, int64_t lanes);

// What a thread packs: the rows of a block, with their border. 0 in place.
int64_t gradient_runs_packed_elements(const Conv2dProblem& problem, const GradientRuns& runs);

void conv2d_runs_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                 const ThreadPool& pool, const void* grad_output, const void* input,
                                 void* grad_weight);

}  // namespace cnnkernels
