#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_weight_gradient.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void conv2d_direct_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* input, void* grad_weight) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    CNNK_TIER_FUNCTION(plan.isa, weight_gradient<T>)(problem, plan, pool, grad_output, input,
                                                     grad_weight);
  });
}

void conv2d_bias_gradient(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                          const void* grad_output, void* grad_bias) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    CNNK_TIER_FUNCTION(isa, bias_gradient<T>)(problem, pool, grad_output, grad_bias);
  });
}

}  // namespace cnnkernels
