// How a list of tensors is cut into chunks and launches.
#include <algorithm>
#include <limits>

#include "kernels/cuda/gradient_step.h"

namespace cnnkernels::cuda {
namespace {

// A thread steps this many bytes of the parameter at the least and at the most. The least is what
// it has under way at once. The most lets a block end soon enough for the last ones to fill the
// device evenly.
constexpr int64_t kLeastBytesPerThread = 32;
constexpr int64_t kMostBytesPerThread = 128;

}  // namespace

GradientStepPlan plan_gradient_step(const std::vector<int64_t>& counts, DType dtype,
                                    const DeviceLimits& limits) {
  GradientStepPlan plan;
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  const int64_t least = kStepThreads * kLeastBytesPerThread / element_size(dtype);
  const int64_t most = kStepThreads * kMostBytesPerThread / element_size(dtype);
  // As many blocks as run at once take everything, if that is not too much for each.
  const int64_t blocks = std::max<int64_t>(
      1, int64_t{limits.multiprocessors} *
             std::min(kStepBlocks, limits.threads_per_multiprocessor / kStepThreads));
  int64_t chunk = std::clamp(round_up(ceil_div(total, blocks), least), least, most);
  // No device has the memory for it, but nothing here overflows.
  constexpr int64_t kMostBlocks = std::numeric_limits<int>::max() / 2;
  while (ceil_div(total, chunk) + static_cast<int64_t>(counts.size()) > kMostBlocks &&
         chunk <= std::numeric_limits<int>::max() / 4) {
    chunk *= 2;
  }
  plan.chunk = static_cast<int>(chunk);
  for (size_t begin = 0; begin < counts.size();) {
    const size_t end = std::min(counts.size(), begin + kMostStepTensors);
    int64_t launched = 0;
    for (size_t i = begin; i < end; ++i) launched += ceil_div(counts[i], chunk);
    if (launched > 0) {
      plan.launches.push_back(
          {begin, end, static_cast<int>(launched), end - begin <= kFewStepTensors});
    }
    begin = end;
  }
  return plan;
}

}  // namespace cnnkernels::cuda
