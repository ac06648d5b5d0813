// Depthwise convolution: one input and one output channel a group, or in NHWC few. See
// conv2d_depthwise_nhwc.inl and conv2d_depthwise_nchw.inl for the ideas.
#pragma once

#include "kernels/conv2d.h"
#include "kernels/cpu/axis_pass.h"
#include "kernels/cpu/packed_planes.h"

namespace cnnkernels {

// The passes of a problem's rows and columns: one for the forward pass, one a
// residue class for the input gradient.
struct DepthwisePasses {
  std::vector<AxisPass> rows, columns;
};
DepthwisePasses depthwise_forward_passes(const Conv2dProblem& problem);
DepthwisePasses depthwise_gradient_passes(const Conv2dProblem& problem);

// How a plane of `rows` rows is packed for passes over its columns: the border left
// and right written out, the columns split by the passes' step.
PackedPlanes depthwise_packed_plane(const std::vector<AxisPass>& columns, int64_t rows);

// Whether planes are turned into vectors of channels: conv2d_depthwise_interleaved.inl.
bool depthwise_interleaves(const Conv2dProblem& problem, int64_t lanes, bool backward);

// The weight gradient sums so many ranges of output rows on their own, a number
// that no count of threads changes.
int64_t depthwise_gradient_chunks(const Conv2dProblem& problem);

void conv2d_depthwise_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                              const ThreadPool& pool, const void* input, const void* weight,
                              const void* bias, void* output);

// Both gradients in one pass over the output's; either may be null.
void conv2d_depthwise_backward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* input,
                               const void* weight, void* grad_input, void* grad_weight);

}  // namespace cnnkernels
