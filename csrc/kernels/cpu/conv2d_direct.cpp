#include "kernels/cpu/conv2d_direct.h"

#include "kernels/cpu/gradient_phase.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_direct.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void conv2d_direct_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const ThreadPool& pool, const void* input, const void* weight,
                           const void* bias, void* output) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, forward<A>)(problem, plan, pool, input, weight, bias, output);
  });
}

void conv2d_direct_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                  const ThreadPool& pool, const void* grad_output,
                                  const void* weight, void* grad_input) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, input_gradient<A>)(problem, plan, pool, grad_output, weight,
                                                    grad_input);
  });
}

}  // namespace cnnkernels
