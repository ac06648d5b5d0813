#include "kernels/cpu/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/max_pool2d_quads.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void max_pool2d_quads_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                              const ThreadPool& pool, const void* input, void* output, void* argmax,
                              bool clips) {
  CNNK_TIER_FUNCTION(plan.isa, quads_forward)(problem, plan, pool, input, output, argmax, clips);
}

void max_pool2d_quads_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* argmax,
                               void* grad_input) {
  CNNK_TIER_FUNCTION(plan.isa, quads_backward)(problem, plan, pool, grad_output, argmax,
                                               grad_input);
}

}  // namespace cnnkernels
