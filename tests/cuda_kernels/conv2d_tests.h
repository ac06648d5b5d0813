// Checks of the convolution kernels.
#pragma once

#include "support.h"

namespace cuda_kernel_tests {

// Every kernel that takes one random convolution: its three passes and its bias's gradient.
void check_conv2d(kernel_tests::Random& random);

}  // namespace cuda_kernel_tests
