// A pass of a convolution as its kernels see it. The forward pass and the input gradient are of one
// form: a result is a sum, over taps and source channels, of source pixels times weights.
//
//   result[n, k, first + i * step] = sum over taps t and channels c of
//     source[n, c, i * source_step + tap[t]] * weight[k, c, t]
//
// Forward there is one phase, of all results, with the kernel's taps. Of the input gradient at
// stride s the residue class of a position says which taps reach it, so that each of the s x s
// classes is a phase, of every s-th result, with its own taps; all phases are one launch.
#pragma once

#include <string>

#include "kernels/conv2d.h"
#include "kernels/cuda/device.h"

namespace cnnkernels::cuda {

struct PassTap {
  int16_t row, column;  // of the source pixel, counted from i * source_step
  int16_t index;        // r * kernel_width + s
};

struct PassPhase {
  int rows, columns;            // of results
  int first_row, first_column;  // of the first result
  int first_tap, taps;
  int first_tile;  // of the results' tiles; a kernel's launch fills it in
};

constexpr int kMostPassTaps = 256;
constexpr int kMostPassPhases = 16;

// Strides are in elements.
struct ConvolutionPass {
  int images, groups;
  int source_channels, result_channels;  // of a group
  int source_height, source_width;
  int source_step_h, source_step_w;
  int result_step_h, result_step_w;
  int64_t source_stride_n, source_stride_c, source_stride_h, source_stride_w;
  int64_t result_stride_n, result_stride_c, result_stride_h, result_stride_w;
  int64_t weight_stride_group, weight_stride_result, weight_stride_source;
  int64_t weight_stride_r, weight_stride_s;
  int kernel_height, kernel_width;
  int phase_count;
  PassPhase phases[kMostPassPhases];
  PassTap taps[kMostPassTaps];

  constexpr int kernel_taps() const { return kernel_height * kernel_width; }
};

// Why no kernel takes a problem; empty if one does.
std::string conv2d_not_native(const Conv2dProblem& problem);

// Pure functions of the problem.
ConvolutionPass forward_pass(const Conv2dProblem& problem);
ConvolutionPass input_gradient_pass(const Conv2dProblem& problem);

}  // namespace cnnkernels::cuda
