#include "kernels/cpu/conv2d_outer_product.h"

#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/gradient_phase.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_outer_product.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

GradientSum gradient_sum(const Conv2dProblem& problem) {
  constexpr int64_t kPixels = 256;
  return {std::max<int64_t>(1, kPixels / (problem.out_height * problem.out_width)),
          std::clamp<int64_t>(kPixels / problem.out_width, 1, problem.out_height)};
}

void conv2d_outer_product_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                  const ThreadPool& pool, const void* input, const void* weight,
                                  const void* bias, void* output) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, forward<A>)(problem, plan, pool, input, weight, bias, output);
  });
}

void conv2d_outer_product_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                         const ThreadPool& pool, const void* grad_output,
                                         const void* weight, void* grad_input) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, input_gradient<A>)(problem, plan, pool, grad_output, weight,
                                                    grad_input);
  });
}

void conv2d_outer_product_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                          const ThreadPool& pool, const void* grad_output,
                                          const void* input, void* grad_weight) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, weight_gradient<A>)(problem, plan, pool, grad_output, input,
                                                     grad_weight);
  });
}

}  // namespace cnnkernels
