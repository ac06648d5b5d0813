// Checks of the weight gradient on tensor cores, for kernel_tests.cpp.
#pragma once

#include "problems.h"

namespace cuda_kernel_tests {

// A random convolution, by a tile that is forced or chosen.
void check_weight_gradient(kernel_tests::Random& random);
// How far float32 is from float64 in a deep product.
void check_weight_gradient_accuracy(kernel_tests::Random& random);

}  // namespace cuda_kernel_tests
