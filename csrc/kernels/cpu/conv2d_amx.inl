// Implicit GEMM on matrix tiles, float32 included.
//
// A tile multiplies bfloat16 sixteen times as fast as vectors multiply floats. A float
// is the sum of three bfloat16, and a product of floats the sum of six products of
// their parts, to 2^-24: still more than twice as fast, and no less accurate, for a
// tile sums pairs of short chains (amx_tile.inl, bfloat16_parts.inl). Where torch is
// asked for less than the highest precision, two parts (three products) or one do.
//
// Rows of the product are pixels, depth the input channels of a tap, columns the
// output channels. Source pixels are packed, a chunk at a time, into blocks of 32
// channels, [part][residue][block][position][channel]: 16 pixels' 32 channels are
// then one kilobyte, which is a tile, and the same tile serves every tap, moved by
// whole pixels. Rows of the image follow one another with their border, so that
// tiles run on over the ends of rows; what they compute in the border is not stored.
// A stride is split into residues before, as if it were 1. A chunk is packed by the
// thread that multiplies it and stays in its second-level cache; weights are packed
// once a call.
//
// A pass goes over its work in one of five orders, each in a file of its own: chunks,
// few pixels, pointwise, in place, row runs. conv2d_amx_pass.inl has what they share.
//
// The input gradient is the same on the output's gradient, one residue class of the
// destinations at a time. The weight gradient is conv2d_amx_weight_gradient.inl.

#include "kernels/cpu/conv2d_amx_pass.inl"

// From a kernel's first weight to its farthest.
inline int64_t last_tap(const Conv2dProblem& problem) {
  return (problem.kernel_height - 1) * problem.weight_stride_r +
         (problem.kernel_width - 1) * problem.weight_stride_s;
}

#include "kernels/cpu/conv2d_amx_chunks.inl"
#include "kernels/cpu/conv2d_amx_few_pixels.inl"
#include "kernels/cpu/conv2d_amx_in_place.inl"
#include "kernels/cpu/conv2d_amx_pointwise.inl"

template <int Parts>
bool grid_pass(const Conv2dPlan& plan, const ThreadPool& pool, const GridProblem& problem) {
  if (plan.amx_order == AmxOrder::few_pixels) return few_pixels_pass<Parts>(plan, pool, problem);
  if (plan.amx_order == AmxOrder::chunks) return chunks_pass<Parts>(plan, pool, problem);
  if (plan.amx_order == AmxOrder::in_place) {
    in_place_pass(plan, pool, problem);
    return true;
  }
  bool finite = true;
  with_storage<float>(problem.dtype, [&](auto element) {
    finite = pointwise_pass<decltype(element), Parts>(plan, pool, problem);
  });
  return finite;
}

#include "kernels/cpu/conv2d_amx_row_runs.inl"

template <int Parts>
bool forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
             const void* input, const void* weight, const void* bias, void* output) {
  const int64_t group_out = problem.out_channels / problem.groups;
  const WeightMatrix matrix = {problem.in_channels / problem.groups,
                               group_out,
                               problem.weight_stride_c,
                               problem.weight_stride_k,
                               group_out * problem.weight_stride_k,
                               problem.weight_stride_r,
                               problem.weight_stride_s,
                               problem.kernel_height * problem.kernel_width,
                               last_tap(problem)};
  const Workspace bias_workspace(problem.out_channels * static_cast<int64_t>(sizeof(float)));
  const float* const wide_bias =
      widened_bias<float>(problem.dtype, bias, problem.out_channels, bias_workspace.as<float>());
  if (plan.amx_order == AmxOrder::row_runs) {
    return row_runs_forward<Parts>(problem, plan, pool, input, weight, wide_bias, output);
  }
  return grid_pass<Parts>(
      plan, pool,
      {problem.dtype, problem.groups, problem.batch, forward_grid(problem),
       pixels_of(problem.layout, problem.in_channels, problem.in_height, problem.in_width),
       pixels_of(problem.layout, problem.out_channels, problem.out_height, problem.out_width),
       input, matrix, weight, wide_bias, output, problem.relu});
}

template <int Parts>
bool input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                    const void* grad_output, const void* weight, void* grad_input) {
  const int64_t group_out = problem.out_channels / problem.groups;
  const WeightMatrix matrix = {group_out,
                               problem.in_channels / problem.groups,
                               problem.weight_stride_k,
                               problem.weight_stride_c,
                               group_out * problem.weight_stride_k,
                               problem.weight_stride_r,
                               problem.weight_stride_s,
                               problem.kernel_height * problem.kernel_width,
                               last_tap(problem)};
  return grid_pass<Parts>(
      plan, pool,
      {problem.dtype, problem.groups, problem.batch, gradient_grid(problem),
       pixels_of(problem.layout, problem.out_channels, problem.out_height, problem.out_width),
       pixels_of(problem.layout, problem.in_channels, problem.in_height, problem.in_width),
       grad_output, matrix, weight, nullptr, grad_input, false});
}

#include "kernels/cpu/conv2d_amx_weight_gradient.inl"
