#include "kernels/cpu/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/max_pool2d_forward.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void max_pool2d_forward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                        const void* input, void* output, void* argmax, bool clips) {
  const MaxPool2dPlan plan = plan_max_pool2d(problem, isa, pool.threads);
  CNNK_TIER_FUNCTION(isa, forward)(problem, plan, pool, input, output, argmax, clips);
}

}  // namespace cnnkernels
