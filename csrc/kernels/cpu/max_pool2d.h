// What the files of max pooling share.
#pragma once

#include "kernels/cpu/packed_planes.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels {

// The columns that windows reach, and the border around them.
PackedPlanes packed_pool_input(const MaxPool2dProblem& problem);

// What the plan chooses from. max_pool2d_quads_* need plan.quads, and
// max_pool2d_shared_rows_forward plan.shared_rows.
void max_pool2d_quads_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                              const ThreadPool& pool, const void* input, void* output, void* argmax,
                              bool clips);
void max_pool2d_shared_rows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                    const ThreadPool& pool, const void* input, void* output,
                                    void* argmax, bool clips);
void max_pool2d_windows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                const ThreadPool& pool, const void* input, void* output,
                                void* argmax, bool clips);
void max_pool2d_quads_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* argmax,
                               void* grad_input);
void max_pool2d_gathered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                  const ThreadPool& pool, const void* grad_output,
                                  const void* argmax, void* grad_input);
void max_pool2d_scattered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* argmax, void* grad_input);

}  // namespace cnnkernels
