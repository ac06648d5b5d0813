// Properties of the CUDA plans.
#pragma once

#include "support.h"

namespace cuda_kernel_tests {

void check_architectures();
// Of one random list of tensors, and of one random pooling, of any size.
void check_step_plan(kernel_tests::Random& random);
void check_pool_plan(kernel_tests::Random& random);

}  // namespace cuda_kernel_tests
