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
  const BorderedImages images = forward_images(problem, plan.in_place);
  const PlaneSource destination =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  // Whether a task reads all elements of consecutive pixels, from memory.
  const bool dense = plan.in_place && problem.layout == Layout::nhwc && problem.groups == 1 &&
                     problem.stride_h == 1 && problem.stride_w == 1;
  forward_pass<A>(problem, plan, pool, images, input, weight, bias, problem.out_height,
                  [&](const ForwardTask<A>& task) {
                    const ChannelsOut<A> out = {problem.dtype, output, destination.channel_stride,
                                                problem.out_channels / problem.groups, task.bias};
                    const PixelBlock<A> block = {
                        task.y1 - task.y0,
                        problem.out_width,
                        task.source + task.y0 * problem.stride_h * images.row,
                        problem.stride_h * images.row,
                        problem.stride_w * images.column,
                        task.image * output_image + task.channel * destination.channel_stride +
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
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const GradientBorder border_h =
      gradient_border(problem.in_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                      problem.dilation_h);
  const GradientBorder border_w =
      gradient_border(problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                      problem.dilation_w);
  const BorderedImages images =
      plan.in_place
          ? bordered_images(problem.layout, problem.out_channels, problem.out_height,
                            problem.out_width)
          : bordered_images(problem.layout, problem.out_channels, border_h.size, border_w.size);

  struct Phase {
    GradientPhase rows, columns;
    std::vector<int64_t> source, weight;
    int64_t panels;  // where the phase's panels begin
  };
  std::vector<Phase> phases;
  int64_t panel_count = 0;
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
      phase.panels = panel_count;
      panel_count +=
          problem.groups * round_up(group_in, lanes) * static_cast<int64_t>(phase.source.size());
      phases.push_back(std::move(phase));
    }
  }

  const int64_t packed_count = plan.in_place ? 0 : plan.images_per_chunk * images.image;
  const Workspace workspace((panel_count + packed_count) * static_cast<int64_t>(sizeof(A)));
  A* const panels = workspace.as<A>();
  A* const packed_data = panels + panel_count;
  for (const Phase& phase : phases) {
    pack_group_panels(pool, serial, problem.dtype, weight, problem.groups,
                      group_out * problem.weight_stride_k, group_in, problem.weight_stride_c,
                      phase.weight, panels + phase.panels);
  }

  const PlaneSource destination =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  const int64_t row_blocks =
      ceil_div(ceil_div(problem.in_height, problem.stride_h), plan.rows_per_task);
  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t chunk = std::min(plan.images_per_chunk, problem.batch - n0);
    if (!plan.in_place) {
      parallel_for(pool, chunk, serial, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          pack_bordered<A>(problem.dtype, grad_output, (n0 + i) * output_image, problem.out_height,
                           problem.out_width, border_h.before, border_w.before, images,
                           packed_data + i * images.image);
        }
      });
    }
    const A* const source =
        plan.in_place ? static_cast<const A*>(grad_output) + n0 * output_image : packed_data;
    parallel_for(pool, chunk * problem.groups * row_blocks, serial,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t j0 = task % row_blocks * plan.rows_per_task;
                     const int64_t group = task / row_blocks % problem.groups;
                     const int64_t image = task / row_blocks / problem.groups;
                     const int64_t c = group * group_in;
                     const ChannelsOut<A> out = {problem.dtype, grad_input,
                                                 destination.channel_stride, group_in, nullptr};
                     for (const Phase& phase : phases) {
                       const int64_t rows = std::min(plan.rows_per_task, phase.rows.count - j0);
                       if (rows <= 0) continue;
                       const int64_t steps = static_cast<int64_t>(phase.source.size());
                       const PixelBlock<A> block = {
                           rows,
                           phase.columns.count,
                           source + image * images.image + group * group_out * images.channel +
                               (phase.rows.packed_first + j0) * images.row +
                               phase.columns.packed_first * images.column,
                           images.row,
                           images.column,
                           (n0 + image) * input_image + c * destination.channel_stride +
                               (phase.rows.first + j0 * problem.stride_h) * destination.row_stride +
                               phase.columns.first * destination.column_stride,
                           problem.stride_h * destination.row_stride,
                           problem.stride_w * destination.column_stride,
                           group_out,
                           plan.in_place && problem.layout == Layout::nhwc && problem.groups == 1};
                       outer_product_block(
                           OuterProductSteps<A>{
                               phase.source.data(), steps,
                               panels + phase.panels + group * round_up(group_in, lanes) * steps,
                               steps * lanes, lanes},
                           out, block);
                     }
                   }
                 });
  }
}
