// Random calls with what they must give: for the kernels of every device.
#pragma once

#include <string>
#include <vector>

#include "kernels/gradient_step.h"
#include "reference.h"
#include "support.h"

namespace kernel_tests {

// A pooling, there and back.
struct MaxPool2dCase {
  cnnkernels::MaxPool2dProblem problem;
  Element element, tap_element;
  Tensor input, grad_output;
  Tensor values, taps;          // of the forward
  Tensor winning_taps;          // the taps, and no winner here and there
  Tensor grad_input, gathered;  // of the winning taps
  Tensor indices;               // of the taps

  MaxPool2dCase(Random& random, const cnnkernels::MaxPool2dProblem& of);

  Dims in_strides() const { return layout_strides(input.shape, problem.layout); }
  Dims out_strides() const { return layout_strides(values.shape, problem.layout); }
};

struct StepTensors {
  Tensor param, grad, buffer;
};

// A gradient step of which every number is exact.
struct GradientStepCase {
  cnnkernels::DType dtype;
  cnnkernels::StepOptions options;
  std::vector<StepTensors> before, after;

  // A list of as many tensors as there are counts of elements.
  GradientStepCase(Random& random, const std::vector<int64_t>& counts);
  std::string describe() const;
};

}  // namespace kernel_tests
