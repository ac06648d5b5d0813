#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_relu_max_pool2d.h"
#include "kernels/cpu/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_relu_max_pool2d_forward.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void conv2d_relu_max_pool2d_direct_forward(const Conv2dReluMaxPool2dProblem& problem,
                                           const Conv2dReluMaxPool2dPlan& plan,
                                           const ThreadPool& pool, const void* input,
                                           const void* weight, const void* bias, void* output,
                                           void* argmax) {
  with_accumulator(problem.conv.dtype, [&](auto accumulator) {
    CNNK_TIER_FUNCTION(plan.isa, forward<decltype(accumulator)>)(problem, plan, pool, input, weight,
                                                                 bias, output, argmax);
  });
}

}  // namespace cnnkernels
