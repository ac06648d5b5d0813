// What the files of max pooling share.
#pragma once

#include "kernels/cpu/packed_planes.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels {

// The columns that windows reach, and the border around them.
PackedPlanes packed_pool_input(const MaxPool2dProblem& problem);

void max_pool2d_gathered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                  const ThreadPool& pool, const void* grad_output,
                                  const void* argmax, void* grad_input);
void max_pool2d_scattered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* argmax, void* grad_input);

}  // namespace cnnkernels
