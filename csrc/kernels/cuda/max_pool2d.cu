// The pooling that a plan names.
#include "kernels/cuda/max_pool2d.h"
#include "kernels/cuda/max_pool2d_kernels.h"

namespace cnnkernels::cuda {

Error max_pool2d_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                         const void* input, void* output, void* argmax, Stream stream, bool clips) {
  const auto pool = plan.kind == PoolAlgorithm::strips ? strips_forward : windows_forward;
  return pool(problem, plan, input, output, argmax, clips, stream);
}

Error max_pool2d_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                          const void* grad_output, const void* argmax, void* grad_input,
                          Stream stream) {
  const auto gather = plan.kind == PoolAlgorithm::strips ? strips_backward : windows_backward;
  return gather(problem, plan, grad_output, argmax, grad_input, stream);
}

}  // namespace cnnkernels::cuda
