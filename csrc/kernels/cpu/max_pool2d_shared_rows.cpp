#include "kernels/cpu/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/max_pool2d_shared_rows.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void max_pool2d_shared_rows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                    const ThreadPool& pool, const void* input, void* output,
                                    void* argmax, bool clips) {
  CNNK_TIER_FUNCTION(plan.isa, shared_rows_forward)(problem, plan, pool, input, output, argmax,
                                                    clips);
}

}  // namespace cnnkernels
