#include "kernels/cpu/conv2d_outer_product.h"

#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/gradient_phase.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_outer_product.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

namespace {

int64_t weight_elements(const Conv2dProblem& problem) {
  return problem.out_channels * (problem.in_channels / problem.groups) * problem.kernel_height *
         problem.kernel_width;
}

// One tap reads a stride's worth of positions once: the others are left out. Planes are
// packed whole, for their rows are copied.
GradientAxis gradient_axis(const Conv2dProblem& problem, int64_t outputs, int64_t kernel,
                           int64_t stride, int64_t pad, int64_t dilation) {
  if (problem.layout == Layout::nhwc && kernel == 1) return {-pad, stride, outputs};
  return {-pad, 1, (outputs - 1) * stride + (kernel - 1) * dilation + 1};
}

}  // namespace

GradientSum gradient_sum(const Conv2dProblem& problem) {
  // Gradients of 256 pixels and 16 channels stay in the first-level cache. Many totals do
  // not stay in the second, and are to be read and written less often.
  constexpr int64_t kManyTotals = 256 * 1024;
  const int64_t pixels = weight_elements(problem) > kManyTotals ? 1024 : 256;
  return {std::clamp<int64_t>(pixels / (problem.out_height * problem.out_width), 1,
                              std::max<int64_t>(1, problem.batch)),
          std::clamp<int64_t>(pixels / problem.out_width, 1, problem.out_height)};
}

GradientAxis gradient_source_rows(const Conv2dProblem& p) {
  return gradient_axis(p, gradient_sum(p).rows, p.kernel_height, p.stride_h, p.pad_top,
                       p.dilation_h);
}

GradientAxis gradient_source_columns(const Conv2dProblem& p) {
  return gradient_axis(p, p.out_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w);
}

int64_t gradient_slices(const Conv2dProblem& problem) {
  // As many as keep some threads busy, if their totals are few.
  constexpr int64_t kMostSlices = 8, kMostElements = 128 * 1024;
  const GradientSum sum = gradient_sum(problem);
  const int64_t sums = ceil_div(problem.batch, sum.images) * ceil_div(problem.out_height, sum.rows);
  const int64_t most =
      std::clamp<int64_t>(kMostElements / weight_elements(problem), 1, kMostSlices);
  return std::clamp<int64_t>(sums, 1, most);
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
