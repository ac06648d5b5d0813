#include "kernels/cpu/conv2d_depthwise.h"

#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_depthwise.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

DepthwisePasses depthwise_forward_passes(const Conv2dProblem& p) {
  return {{forward_axis(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
                        p.dilation_h)},
          {forward_axis(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left,
                        p.dilation_w)}};
}

DepthwisePasses depthwise_gradient_passes(const Conv2dProblem& p) {
  return {
      gradient_axis(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
                    p.dilation_h),
      gradient_axis(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w)};
}

PackedPlanes depthwise_packed_plane(const std::vector<AxisPass>& columns, int64_t rows) {
  PackedPlanes packed = {0, 0, rows, columns[0].step, 1};
  int64_t last = 0;
  for (const AxisPass& pass : columns) {
    for (const AxisTap& tap : pass.taps) {
      packed.left = std::max(packed.left, -tap.source);
      last = std::max(last, (pass.count - 1) * pass.step + tap.source);
    }
  }
  packed.row_length = ceil_div(last + packed.left + 1, packed.phases);
  return packed;
}

bool depthwise_interleaves(const Conv2dProblem& problem, int64_t lanes, bool backward) {
  // Planes of a vector of channels, and their gradients, stay in the second-level cache.
  // The forward pass has fewer operations to pay for the transposes of large planes.
  const int64_t most_elements = backward ? 512 * 1024 : 256 * 1024;
  const int64_t elements =
      lanes * (2 * problem.in_height * problem.in_width + problem.out_height * problem.out_width);
  return problem.layout == Layout::nchw && problem.out_channels >= lanes / 2 &&
         elements <= most_elements && (problem.stride_w > 1 || problem.out_width < 2 * lanes);
}

int64_t depthwise_gradient_chunks(const Conv2dProblem& problem) {
  const int64_t rows = problem.batch * problem.out_height;
  return std::clamp<int64_t>(problem.multiply_adds() / kSerialMultiplyAdds, 1,
                             std::clamp<int64_t>(rows, 1, 32));
}

namespace {

// Calls body with the channels of a group in channels_last.
template <class Body>
void with_group_channels(const Conv2dProblem& problem, Body&& body) {
  switch (problem.in_channels / problem.groups) {
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      return body(std::integral_constant<int, 1>{});
  }
}

}  // namespace

void conv2d_depthwise_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                              const ThreadPool& pool, const void* input, const void* weight,
                              const void* bias, void* output) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::nhwc) {
      return with_group_channels(problem, [&](auto group) {
        CNNK_TIER_FUNCTION(plan.isa, nhwc_forward<T, decltype(group)::value>)
        (problem, plan, pool, input, weight, bias, output);
      });
    }
    const auto run = depthwise_interleaves(problem, plan.vector_lanes, false)
                         ? CNNK_TIER_FUNCTION(plan.isa, interleaved_forward<T>)
                         : CNNK_TIER_FUNCTION(plan.isa, nchw_forward<T>);
    run(problem, plan, pool, input, weight, bias, output);
  });
}

void conv2d_depthwise_backward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* input,
                               const void* weight, void* grad_input, void* grad_weight) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::nhwc) {
      return with_group_channels(problem, [&](auto group) {
        CNNK_TIER_FUNCTION(plan.isa, nhwc_backward<T, decltype(group)::value>)
        (problem, plan, pool, grad_output, input, weight, grad_input, grad_weight);
      });
    }
    const auto run = depthwise_interleaves(problem, plan.vector_lanes, true)
                         ? CNNK_TIER_FUNCTION(plan.isa, interleaved_backward<T>)
                         : CNNK_TIER_FUNCTION(plan.isa, nchw_backward<T>);
    run(problem, plan, pool, grad_output, input, weight, grad_input, grad_weight);
  });
}

}  // namespace cnnkernels
