#include "kernels/gradient_step.h"

namespace cnnkernels {
namespace {

constexpr int64_t kSerialElements = 64 * 1024;
constexpr int64_t kChunkElements = 4 * 1024;

}  // namespace
}  // namespace cnnkernels

#define CNNK_TIER_SOURCE "kernels/cpu/gradient_step.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void gradient_step(DType dtype, Isa isa, const ThreadPool& pool,
                   const std::vector<StepTensor>& tensors, const StepOptions& options) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    CNNK_TIER_FUNCTION(isa, step<T>)(pool, tensors, options);
  });
}

}  // namespace cnnkernels
