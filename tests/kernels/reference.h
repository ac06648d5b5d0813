// The operations as naive loops in double.
#pragma once

#include "kernels/conv2d_relu_max_pool2d.h"
#include "support.h"

namespace kernel_tests {

struct Conv2dGradients {
  Tensor input, weight, bias;
};

struct Pooled {
  Tensor values, taps;
};

Tensor conv2d(const cnnkernels::Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
              const Tensor* bias);

Conv2dGradients conv2d_gradients(const cnnkernels::Conv2dProblem& problem,
                                 const Tensor& grad_output, const Tensor& input,
                                 const Tensor& weight);

Pooled max_pool2d(const cnnkernels::MaxPool2dProblem& problem, const Tensor& input);

constexpr int64_t kOutside = -1;

// Where tap `tap` of window (y, x) lies in its input plane, or kOutside.
int64_t tap_position(const cnnkernels::MaxPool2dProblem& problem, int64_t y, int64_t x,
                     int64_t tap);

// Of every window: where its winner lies in the input tensor.
std::vector<int64_t> winners(const cnnkernels::MaxPool2dProblem& problem, const Tensor& taps);

Tensor relu(const Tensor& input);

// Of max_pool2d(relu(conv2d(input))), whose values and taps are `pooled`. A
// window without a positive value or a gradient adds nothing, not even the NaN
// of zero times infinity.
Conv2dGradients conv2d_relu_max_pool2d_gradients(
    const cnnkernels::Conv2dReluMaxPool2dProblem& problem, const Tensor& grad_output,
    const Tensor& input, const Tensor& weight, const Pooled& pooled);

}  // namespace kernel_tests
