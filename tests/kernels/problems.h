// Random problems, small enough that hundreds run in seconds, and their tensors.
#pragma once

#include <limits>
#include <string>

#include "kernels/conv2d_relu_max_pool2d.h"
#include "support.h"

namespace kernel_tests {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

DType random_dtype(Random& random);

// Quarters of integers of at most `limit`, of which all sums are exact; in float64
// integers, scaled so that they need more bits than a float has.
Tensor random_tensor(Random& random, const Dims& shape, DType dtype, int64_t limit = 4);

// Replaces `count` elements by infinities and NaN.
void add_specials(Random& random, Tensor& tensor, int64_t count);

cnnkernels::Conv2dProblem random_conv2d(Random& random);
// No window lies wholly outside of the image: torch has none.
cnnkernels::MaxPool2dProblem random_max_pool2d(Random& random);
cnnkernels::Conv2dReluMaxPool2dProblem random_block(Random& random);

std::string describe(DType dtype, Layout layout);
std::string describe(const cnnkernels::Conv2dProblem& problem);
std::string describe(const cnnkernels::MaxPool2dProblem& problem);

}  // namespace kernel_tests
