#include "kernels/cpu/conv2d_patches.h"

#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_patches.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {
namespace {

// Whether sizes with these strides, the innermost first, lie without gaps.
bool lies_dense(const int64_t (&sizes)[3], const int64_t (&strides)[3]) {
  int64_t dense = 1;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] != 1 && strides[i] != dense) return false;
    dense *= sizes[i];
  }
  return true;
}

}  // namespace

PatchOrder patch_order(const Conv2dProblem& p) {
  const int64_t channels = p.in_channels / p.groups;
  if (lies_dense({p.kernel_width, p.kernel_height, channels},
                 {p.weight_stride_s, p.weight_stride_r, p.weight_stride_c})) {
    return {true, true};
  }
  return {lies_dense({channels, p.kernel_width, p.kernel_height},
                     {p.weight_stride_c, p.weight_stride_s, p.weight_stride_r}),
          false};
}

void conv2d_patches_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const ThreadPool& pool, const void* input, const void* weight,
                            const void* bias, void* output) {
  with_dtype(problem.dtype, [&](auto element) {
    CNNK_TIER_FUNCTION(plan.isa, patches_forward<decltype(element)>)
    (problem, plan, pool, input, weight, bias, output);
  });
}

void conv2d_patches_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* weight, void* grad_input) {
  with_dtype(problem.dtype, [&](auto element) {
    CNNK_TIER_FUNCTION(plan.isa, patches_input_gradient<decltype(element)>)
    (problem, plan, pool, grad_output, weight, grad_input);
  });
}

void conv2d_patches_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                    const ThreadPool& pool, const void* grad_output,
                                    const void* input, void* grad_weight) {
  with_dtype(problem.dtype, [&](auto element) {
    CNNK_TIER_FUNCTION(plan.isa, patches_weight_gradient<decltype(element)>)
    (problem, plan, pool, grad_output, input, grad_weight);
  });
}

}  // namespace cnnkernels
