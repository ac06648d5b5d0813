// The launches behind max_pool2d.h, and what they share.
#pragma once

#include "kernels/cuda/max_pool2d.h"

namespace cnnkernels::cuda {

// Sizes as kernels take them: planes count as images of one channel, so that both layouts are
// images x pixels x channels. Positions inside of a plane fit 32 bits; what counts elements of a
// tensor has 64.
constexpr int kWinnersTap = -1;
struct PoolGeometry {
  int64_t images;
  int channels;
  int in_height, in_width;
  int out_height, out_width;
  int kernel_height, kernel_width;
  int stride_h, stride_w;
  int pad_top, pad_left;
  int dilation_h, dilation_w;
  int clipped_tap;  // of windows whose maximum is not positive, or kWinnersTap

  explicit PoolGeometry(const MaxPool2dProblem& problem, bool clips = false);
};

// Windows of a thread's strip, for elements of so many bytes: the columns below it are then one
// access of 16 bytes, and the accesses of a warp lie in one piece. Where a row is no multiple of
// that, a strip half or a quarter as wide may fit.
constexpr int widest_strip(int64_t bytes) { return static_cast<int>(8 / bytes); }

Error strips_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const void* input,
                     void* output, void* argmax, bool clips, Stream stream);
Error strips_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                      const void* grad_output, const void* argmax, void* grad_input, Stream stream);
Error windows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const void* input,
                      void* output, void* argmax, bool clips, Stream stream);
Error windows_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                       const void* grad_output, const void* argmax, void* grad_input,
                       Stream stream);

}  // namespace cnnkernels::cuda
