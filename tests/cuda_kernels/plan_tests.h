// Properties of the CUDA plans.
#pragma once

#include "support.h"

namespace cuda_kernel_tests {

void check_architectures();
// Of one random list of tensors, one random pooling, one random convolution and one random block,
// of any size.
void check_step_plan(kernel_tests::Random& random);
void check_pool_plan(kernel_tests::Random& random);
void check_conv2d_plan(kernel_tests::Random& random);
void check_block_plan(kernel_tests::Random& random);
void check_conv2d_policies();
// All passes of a small random convolution, each as a random policy plans it.
void check_planned_conv2d(kernel_tests::Random& random);

}  // namespace cuda_kernel_tests
