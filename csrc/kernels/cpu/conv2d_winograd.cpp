#include "kernels/cpu/conv2d_winograd.h"

#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_winograd.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

int64_t winograd_tiles_per_task(int64_t from_channels, int64_t to_channels, int64_t tiles,
                                int threads) {
  // Transformed tiles should stay in the second-level cache, but each transformed weight
  // should serve many of them.
  constexpr int64_t kBytes = 2 * 1024 * 1024, kLeast = 64, kMost = 512;
  const int64_t tile_bytes = 16 * 4 * (from_channels + to_channels);
  const int64_t most = std::clamp(kBytes / tile_bytes, kLeast, kMost);
  const int64_t tasks = round_up(std::max<int64_t>(1, ceil_div(tiles, most)), threads);
  return round_up(std::max<int64_t>(1, ceil_div(tiles, tasks)), 8);
}

bool conv2d_winograd_forward(const Conv2dProblem& p, const Conv2dPlan& plan, const ThreadPool& pool,
                             const void* input, const void* weight, const void* bias,
                             void* output) {
  return CNNK_TIER_FUNCTION(plan.isa, winograd_pass)(
      plan, pool, p.batch, {p.dtype, p.layout, p.in_channels, p.in_height, p.in_width}, input,
      {p.dtype, p.layout, p.out_channels, p.out_height, p.out_width}, output, p.pad_top, p.pad_left,
      {weight, 0, p.weight_stride_c, p.weight_stride_k, p.weight_stride_r, p.weight_stride_s}, bias,
      p.relu);
}

bool conv2d_winograd_input_gradient(const Conv2dProblem& p, const Conv2dPlan& plan,
                                    const ThreadPool& pool, const void* grad_output,
                                    const void* weight, void* grad_input) {
  // A convolution with the kernel turned around, whose border is what the forward
  // pass's left of the kernel.
  return CNNK_TIER_FUNCTION(plan.isa, winograd_pass)(
      plan, pool, p.batch, {p.dtype, p.layout, p.out_channels, p.out_height, p.out_width},
      grad_output, {p.dtype, p.layout, p.in_channels, p.in_height, p.in_width}, grad_input,
      2 - p.pad_top, 2 - p.pad_left,
      {weight, 2 * p.weight_stride_r + 2 * p.weight_stride_s, p.weight_stride_k, p.weight_stride_c,
       -p.weight_stride_r, -p.weight_stride_s},
      nullptr, false);
}

}  // namespace cnnkernels
