#include "kernels/cpu/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/max_pool2d_backward.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void max_pool2d_gathered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                  const ThreadPool& pool, const void* grad_output,
                                  const void* argmax, void* grad_input) {
  CNNK_TIER_FUNCTION(plan.isa, gather_backward)(problem, plan, pool, grad_output, argmax,
                                                grad_input);
}

}  // namespace cnnkernels
