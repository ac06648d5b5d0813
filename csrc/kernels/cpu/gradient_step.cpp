#include "kernels/gradient_step.h"

#include <algorithm>

#define CNNK_TIER_SOURCE "kernels/cpu/gradient_step.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {
namespace {

// To hand a half over to a thread that waits for work costs 2 to 3 microseconds, as much as 16,000
// elements take; to one that sleeps, ten times as much. With twice this many elements a second
// thread saves a fifth of the call.
constexpr int64_t kTaskElements = 24 * 1024;
// Lists of more than this outgrow the second-level caches of several cores.
constexpr int64_t kFetchedElements = 1024 * 1024;
// Tasks begin on pages of their own, wherever a tensor begins on one.
constexpr int64_t kTaskMultiple = 1024;

bool has_repeats(const std::vector<StepTensor>& tensors) {
  std::vector<const void*> params;
  params.reserve(tensors.size());
  for (const StepTensor& tensor : tensors) {
    if (tensor.count != 0) params.push_back(tensor.param);
  }
  std::sort(params.begin(), params.end());
  return std::adjacent_find(params.begin(), params.end()) != params.end();
}

}  // namespace

GradientStepPlan plan_gradient_step(const std::vector<StepTensor>& tensors, Isa isa, int threads) {
  GradientStepPlan plan;
  plan.isa = isa;
  plan.threads = threads;
  plan.ends.reserve(tensors.size());
  int64_t total = 0;
  for (const StepTensor& tensor : tensors) plan.ends.push_back(total += tensor.count);
  // A tensor listed twice is stepped twice, one step after the other.
  const int64_t tasks =
      has_repeats(tensors) ? 1 : std::clamp<int64_t>(total / kTaskElements, 1, threads);
  plan.elements_per_task = tasks == 1 ? total : round_up(ceil_div(total, tasks), kTaskMultiple);
  plan.fetches_ahead = total >= kFetchedElements;
  return plan;
}

void gradient_step(DType dtype, const GradientStepPlan& plan, const ThreadPool& pool,
                   const std::vector<StepTensor>& tensors, const StepOptions& options) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    CNNK_TIER_FUNCTION(plan.isa, step<T>)(plan, pool, tensors, options);
  });
}

}  // namespace cnnkernels
