#include "kernels/cpu/conv2d_runs.h"

#include <algorithm>

#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_runs_weight_gradient.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

GradientRuns gradient_runs(const Conv2dProblem& p, int64_t lanes) {
  // Operands of a block, of which a tile reads a part. A block is a chain of products, which
  // without fused multiply-adds is shorter.
  constexpr int64_t kBlockBytes = 64 * 1024;
  constexpr int64_t kFewestPixels = 24;
  constexpr int64_t kMostPixels = 64, kMostRoundedPixels = 32;
  // Totals that stay in the second-level cache, of enough slices to share out.
  constexpr int64_t kTotalsBytes = 1024 * 1024, kFewestSlices = 8, kMostSlices = 64;
  GradientRuns runs = {};
  const int64_t size = accumulator_size(p.dtype);
  const int64_t most_pixels =
      lanes * size > vector_bytes(Isa::baseline) ? kMostPixels : kMostRoundedPixels;
  const bool one_tap = p.kernel_height == 1 && p.kernel_width == 1;
  // The wider side, if it fills its vectors.
  runs.input_vectors = one_tap && p.in_channels >= lanes &&
                       ceil_div(p.in_channels, lanes) * lanes * p.out_channels <=
                           ceil_div(p.out_channels, lanes) * lanes * p.in_channels &&
                       (p.in_channels > p.out_channels || p.out_channels % lanes != 0);
  runs.vector_channels = runs.input_vectors ? p.in_channels : p.out_channels;
  runs.run = runs.input_vectors ? p.out_channels : p.kernel_width * p.in_channels;
  const int64_t pixel_bytes =
      size *
      (p.out_channels + p.in_channels * std::min(p.stride_w, p.kernel_width) * p.kernel_height);
  const int64_t most = std::clamp(kBlockBytes / pixel_bytes, kFewestPixels, most_pixels);
  runs.images = p.batch;
  runs.rows = p.out_height;
  runs.columns = p.out_width;
  if (one_tap && p.stride_h == 1 && p.stride_w == 1 && p.out_height == p.in_height &&
      p.out_width == p.in_width && p.pad_top == 0 && p.pad_left == 0) {
    runs.pixels = p.batch * p.out_height * p.out_width;
    runs.images = 1;
    runs.columns = most;
    runs.rows = ceil_div(runs.pixels, most);
  }
  runs.block_rows = std::clamp<int64_t>(most / std::max<int64_t>(1, runs.columns), 1,
                                        std::max<int64_t>(1, runs.rows));
  runs.block_columns = ceil_div(runs.columns, std::max<int64_t>(1, ceil_div(runs.columns, most)));
  const int64_t totals = size * p.kernel_height * runs.run * round_up(runs.vector_channels, lanes);
  runs.slices = std::clamp<int64_t>(runs.blocks() / 4, 1,
                                    std::clamp(kTotalsBytes / totals, kFewestSlices, kMostSlices));
  return runs;
}

int64_t gradient_runs_packed_elements(const Conv2dProblem& p, const GradientRuns& runs) {
  const int64_t rows = (p.out_height - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h + 1;
  const int64_t columns = (p.out_width - 1) * p.stride_w + p.kernel_width;
  if (p.pad_top == 0 && p.pad_left == 0 && rows <= p.in_height && columns <= p.in_width) return 0;
  return ((runs.block_rows - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h + 1) * columns *
         p.in_channels;
}

void conv2d_runs_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                 const ThreadPool& pool, const void* grad_output, const void* input,
                                 void* grad_weight) {
  with_accumulator(problem.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    CNNK_TIER_FUNCTION(plan.isa, weight_gradient<A>)(problem, plan, pool, grad_output, input,
                                                     grad_weight);
  });
}

}  // namespace cnnkernels
