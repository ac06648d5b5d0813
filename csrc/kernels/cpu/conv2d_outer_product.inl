// Convolution by outer products: vectors along the output channels.
//
// Every output pixel's channels are a sum over (input channel, tap) steps of a
// broadcast source element times a vector of weights; a register tile
// (outer_product_tile.inl) does some pixels by some vectors at once. Channels
// fill the lanes however narrow the rows are, and a source without a border is
// read where it lies, in either layout. Weights are first packed into panels in
// the order of the steps.
//
// The input gradient is the same on the output's gradient with the channels'
// roles exchanged, one residue class at a time (gradient_phase.h). The weight
// gradient has a file of its own, conv2d_outer_product_weight_gradient.inl.

#include "kernels/cpu/conv2d_outer_product_block.inl"
#include "kernels/cpu/conv2d_outer_product_weight_gradient.inl"

template <class A>
void forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
             const void* input, const void* weight, const void* bias, void* output) {
  const PassSource source = forward_source(problem, plan, input, 1);
  const BorderedImages& images = source.images;
  const PlaneSource destination =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  // Whether a task reads all elements of consecutive pixels, from memory.
  const bool dense = plan.in_place && !plan.weights_first && problem.layout == Layout::nhwc &&
                     problem.groups == 1 && problem.stride_h == 1 && problem.stride_w == 1;
  forward_pass<A>(
      problem, plan, pool, source, weight, bias, problem.out_height,
      [&](const ForwardTask<A>& task) {
        const ChannelsOut<A> out = {problem.dtype, output,    destination.channel_stride,
                                    task.channels, task.bias, problem.relu};
        const PixelBlock<A> block = {task.y1 - task.y0,
                                     problem.out_width,
                                     task.source,
                                     problem.stride_h * images.row,
                                     problem.stride_w * images.column,
                                     task.image * output_image +
                                         task.channel * destination.channel_stride +
                                         task.y0 * destination.row_stride,
                                     destination.row_stride,
                                     destination.column_stride,
                                     problem.in_channels / problem.groups *
                                         std::min(problem.stride_h, problem.kernel_height) *
                                         std::min(problem.stride_w, problem.kernel_width),
                                     dense};
        outer_product_block(task.steps, out, block);
      });
}

template <class A>
void input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                    const void* grad_output, const void* weight, void* grad_input) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const GradientBorder border_h =
      gradient_border(problem.in_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                      problem.dilation_h);
  const GradientBorder border_w =
      gradient_border(problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                      problem.dilation_w);
  // The rows that a task reads begin before its first and end after its last, by a border
  // and where a class is counted from within the padding.
  const int64_t task_rows =
      plan.rows_per_task + border_h.before + ceil_div(problem.pad_top, problem.stride_h);
  const PassSource source = {problem.dtype,
                             grad_output,
                             problem.out_height,
                             problem.out_width,
                             border_h.before,
                             border_w.before,
                             1,
                             plan.in_place,
                             plan.in_place ? bordered_images(problem.layout, problem.out_channels,
                                                             problem.out_height, problem.out_width)
                                           : bordered_images(problem.layout, problem.out_channels,
                                                             task_rows, border_w.size)};
  const BorderedImages& images = source.images;

  struct Phase {
    GradientPhase rows, columns;
    std::vector<int64_t> source, weight;
  };
  std::vector<Phase> phases;
  for (int64_t phase_h = 0; phase_h < problem.stride_h; ++phase_h) {
    for (int64_t phase_w = 0; phase_w < problem.stride_w; ++phase_w) {
      Phase phase;
      phase.rows = gradient_phase(phase_h, problem.in_height, problem.kernel_height,
                                  problem.stride_h, problem.pad_top, problem.dilation_h);
      phase.columns = gradient_phase(phase_w, problem.in_width, problem.kernel_width,
                                     problem.stride_w, problem.pad_left, problem.dilation_w);
      if (phase.rows.count == 0 || phase.columns.count == 0) continue;
      const auto add = [&](int64_t k, int64_t r, int64_t s) {
        phase.source.push_back(
            k * images.channel +
            (border_h.before - r * problem.dilation_h / problem.stride_h) * images.row +
            (border_w.before - s * problem.dilation_w / problem.stride_w) * images.column);
        phase.weight.push_back(k * problem.weight_stride_k + r * problem.weight_stride_r +
                               s * problem.weight_stride_s);
      };
      const bool channels_outside = problem.layout == Layout::nchw;
      for (int64_t k0 = 0; k0 < (channels_outside ? group_out : 1); ++k0) {
        for (const int64_t r : phase.rows.kernel_indices) {
          for (const int64_t s : phase.columns.kernel_indices) {
            for (int64_t k = 0; k < (channels_outside ? 1 : group_out); ++k) add(k0 + k, r, s);
          }
        }
      }
      phases.push_back(std::move(phase));
    }
  }

  std::vector<const std::vector<int64_t>*> weight_steps;
  for (const Phase& phase : phases) weight_steps.push_back(&phase.weight);

  const PlaneSource destination =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t part_channels = round_up(plan.channels_per_task, lanes);
  outer_product_pass<A>(
      plan, pool, source,
      {weight, problem.groups, group_out * problem.weight_stride_k, group_in,
       problem.weight_stride_c},
      weight_steps, problem.batch, ceil_div(problem.in_height, problem.stride_h),
      [&](const PassTask<A>& task) {
        const ChannelsOut<A> out = {problem.dtype, grad_input, destination.channel_stride,
                                    task.channels, nullptr};
        const A* panels = task.panels;
        for (const Phase& phase : phases) {
          const int64_t steps = static_cast<int64_t>(phase.source.size());
          const A* const phase_panels = panels;
          panels += part_channels * steps;
          const int64_t rows = std::min(plan.rows_per_task, phase.rows.count - task.y0);
          if (rows <= 0) continue;
          const PixelBlock<A> block = {
              rows,
              phase.columns.count,
              task.source + task.group * group_out * images.channel +
                  phase.rows.packed_first * images.row + phase.columns.packed_first * images.column,
              images.row,
              images.column,
              task.image * input_image +
                  (task.group * group_in + task.channel) * destination.channel_stride +
                  (phase.rows.first + task.y0 * problem.stride_h) * destination.row_stride +
                  phase.columns.first * destination.column_stride,
              problem.stride_h * destination.row_stride,
              problem.stride_w * destination.column_stride,
              group_out,
              plan.in_place && !plan.weights_first && problem.layout == Layout::nhwc &&
                  problem.groups == 1};
          outer_product_block(
              OuterProductSteps<A>{phase.source.data(), steps, phase_panels, steps * lanes, lanes},
              out, block);
        }
      });
}
