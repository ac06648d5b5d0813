// Checks of the convolution kernels.
#pragma once

#include "support.h"

namespace cuda_kernel_tests {

// Strides of what has one dimension.
inline const kernel_tests::Dims kVector = {1, 1, 1, 1};
// Shared memory of a block of an H100.
constexpr int64_t kSharedBytes = 227 * 1024;

// Every kernel that takes one random convolution: its three passes and its bias's gradient.
void check_conv2d(kernel_tests::Random& random);

// The depthwise kernels on a random convolution that is one.
void check_depthwise(kernel_tests::Random& random);

// The kernels of the fused block on a random one.
void check_block(kernel_tests::Random& random);

// The distance of float32's products of parts from double, beside that of a chain of floats; and
// infinite operands.
void check_conv2d_accuracy(kernel_tests::Random& random);
void check_conv2d_specials(kernel_tests::Random& random);

// One random convolution that the kernel of warpgroup products takes.
void check_wgmma(kernel_tests::Random& random);
// Which it takes.
void check_wgmma_cut();

}  // namespace cuda_kernel_tests
