// Direct convolution: vectors along the output row, no im2col.
//
// Packing (packed_planes.h) turns every stride, padding, dilation, layout and
// element type into contiguous vector loads, so that one register tile
// (direct_tile.inl) serves them all. The input gradient is the same
// computation on the output's gradient: for stride s the input's columns fall
// into s residue classes, and within a class the gradient is a stride-1
// convolution with those taps that hit the class.
//
// A chunk of images is packed at a time, about kPackedChunkBytes, so that the
// tiles read it from the cache; then tasks of (image, group, channels, rows)
// run in parallel. An input that needs no packing is read where it lies.

#include "kernels/cpu/direct_tile.inl"
#include "kernels/cpu/pack_planes.inl"
#include "kernels/cpu/widened_weights.inl"

template <class A>
void forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
             const void* input, const void* weight, const void* bias_data, void* output) {
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;

  PackedPlanes packed = packed_input(problem, problem.stride_w);
  if (plan.in_place) {
    packed.row_length = problem.in_width;
    packed.rows = problem.in_height;
  }
  const int64_t packed_image = problem.in_channels * packed.plane();

  const int64_t packed_count = plan.in_place ? 0 : plan.images_per_chunk * packed_image + kLanes<A>;
  const int64_t parameters =
      widens(problem.dtype) ? weight_count(problem) + problem.out_channels : 0;
  const Workspace workspace((packed_count + parameters) * static_cast<int64_t>(sizeof(A)));
  A* const packed_data = workspace.as<A>();
  A* const parameter_data = packed_data + packed_count;
  const A* const bias =
      widened_bias<A>(problem.dtype, bias_data, problem.out_channels, parameter_data);
  const WidenedWeights<A> weights =
      widened_weights<A>(problem, weight, parameter_data + problem.out_channels);
  const std::vector<Tap> taps = forward_taps(problem, packed, weights.stride_r, weights.stride_s);

  const PlaneSource source =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const PlaneSource destination =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  const int64_t channel_blocks = ceil_div(group_out, plan.channels_per_task);
  const int64_t row_blocks = ceil_div(problem.out_height, plan.rows_per_task);
  const int64_t pack_blocks = ceil_div(problem.in_channels, kInterleavedChannels);

  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t images = std::min(plan.images_per_chunk, problem.batch - n0);
    if (!plan.in_place) {
      parallel_for(pool, images * pack_blocks, serial, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / pack_blocks;
          const int64_t c0 = i % pack_blocks * kInterleavedChannels;
          pack_planes_as<A>(problem.dtype, input,
                            (n0 + image) * input_image + c0 * source.channel_stride, source,
                            std::min(kInterleavedChannels, problem.in_channels - c0), packed, A{0},
                            packed_data + image * packed_image + c0 * packed.plane());
        }
      });
    }
    const int64_t tasks = images * problem.groups * channel_blocks * row_blocks;
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row_block = task % row_blocks;
        const int64_t channel_block = task / row_blocks % channel_blocks;
        const int64_t group = task / row_blocks / channel_blocks % problem.groups;
        const int64_t image = task / row_blocks / channel_blocks / problem.groups;
        const A* const images = plan.in_place
                                    ? static_cast<const A*>(input) + (n0 + image) * input_image
                                    : packed_data + image * packed_image;
        const A* const planes = images + group * group_in * packed.plane();
        const int64_t k = group * group_out + channel_block * plan.channels_per_task;
        DirectRow<A> row;
        row.shape = {packed.plane(), group_in, taps.data(), static_cast<int64_t>(taps.size()),
                     nullptr};
        row.weights = {weights.data + k * weights.stride_k, weights.stride_k, weights.stride_c};
        row.bias = bias != nullptr ? bias + k : nullptr;
        row.relu = problem.relu;
        row.dtype = problem.dtype;
        row.out = output;
        row.out_channel_step = destination.channel_stride;
        row.out_lane_step = destination.column_stride;
        row.width = problem.out_width;
        row.channels =
            std::min(plan.channels_per_task, group_out - channel_block * plan.channels_per_task);
        const int64_t y0 = row_block * plan.rows_per_task;
        const int64_t y1 = std::min(problem.out_height, y0 + plan.rows_per_task);
        for (int64_t y = y0; y < y1; ++y) {
          row.source = planes + y * problem.stride_h * packed.pitch();
          row.out_at = (n0 + image) * output_image + k * destination.channel_stride +
                       y * destination.row_stride;
          direct_row(row);
        }
      }
    });
  }
}

template <class A>
void input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                    const void* grad_output, const void* weight, void* grad_input) {
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;

  const GradientBorder border_h =
      gradient_border(problem.in_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                      problem.dilation_h);
  const GradientBorder border_w =
      gradient_border(problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                      problem.dilation_w);
  const PackedPlanes packed = {border_h.before, border_w.before, border_h.size, 1, border_w.size};

  const int64_t packed_image = problem.out_channels * packed.plane();
  const int64_t packed_count = plan.images_per_chunk * packed_image + kLanes<A>;
  const int64_t parameters = widens(problem.dtype) ? weight_count(problem) : 0;
  const Workspace workspace((packed_count + parameters) * static_cast<int64_t>(sizeof(A)));
  A* const packed_data = workspace.as<A>();
  const WidenedWeights<A> weights = widened_weights<A>(problem, weight, packed_data + packed_count);

  struct Phase {
    GradientPhase rows, columns;
    std::vector<Tap> taps;
  };
  std::vector<Phase> phases;
  for (int64_t phase_h = 0; phase_h < problem.stride_h; ++phase_h) {
    for (int64_t phase_w = 0; phase_w < problem.stride_w; ++phase_w) {
      Phase phase;
      phase.rows = gradient_phase(phase_h, problem.in_height, problem.kernel_height,
                                  problem.stride_h, problem.pad_top, problem.dilation_h);
      phase.columns = gradient_phase(phase_w, problem.in_width, problem.kernel_width,
                                     problem.stride_w, problem.pad_left, problem.dilation_w);
      for (const int64_t r : phase.rows.kernel_indices) {
        for (const int64_t s : phase.columns.kernel_indices) {
          phase.taps.push_back(
              {(border_h.before - r * problem.dilation_h / problem.stride_h) * packed.pitch() +
                   border_w.before - s * problem.dilation_w / problem.stride_w,
               r * weights.stride_r + s * weights.stride_s});
        }
      }
      if (phase.rows.count > 0 && phase.columns.count > 0) phases.push_back(std::move(phase));
    }
  }

  const PlaneSource source =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const PlaneSource destination =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  const int64_t channel_blocks = ceil_div(group_in, plan.channels_per_task);
  const int64_t row_blocks =
      ceil_div(ceil_div(problem.in_height, problem.stride_h), plan.rows_per_task);
  const int64_t pack_blocks = ceil_div(problem.out_channels, kInterleavedChannels);

  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t images = std::min(plan.images_per_chunk, problem.batch - n0);
    parallel_for(pool, images * pack_blocks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / pack_blocks;
        const int64_t k0 = i % pack_blocks * kInterleavedChannels;
        pack_planes_as<A>(problem.dtype, grad_output,
                          (n0 + image) * output_image + k0 * source.channel_stride, source,
                          std::min(kInterleavedChannels, problem.out_channels - k0), packed, A{0},
                          packed_data + image * packed_image + k0 * packed.plane());
      }
    });
    const int64_t tasks = images * problem.groups * channel_blocks * row_blocks;
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row_block = task % row_blocks;
        const int64_t channel_block = task / row_blocks % channel_blocks;
        const int64_t group = task / row_blocks / channel_blocks % problem.groups;
        const int64_t image = task / row_blocks / channel_blocks / problem.groups;
        const int64_t group_c = channel_block * plan.channels_per_task;
        const int64_t c = group * group_in + group_c;
        const A* const planes =
            packed_data + image * packed_image + group * group_out * packed.plane();
        const int64_t at = (n0 + image) * input_image + c * destination.channel_stride;
        for (const Phase& phase : phases) {
          DirectRow<A> row;
          row.shape = {packed.plane(), group_out, phase.taps.data(),
                       static_cast<int64_t>(phase.taps.size()), nullptr};
          row.weights = {
              weights.data + group * group_out * weights.stride_k + group_c * weights.stride_c,
              weights.stride_c, weights.stride_k};
          row.bias = nullptr;
          row.dtype = problem.dtype;
          row.out = grad_input;
          row.out_channel_step = destination.channel_stride;
          row.out_lane_step = destination.column_stride * problem.stride_w;
          row.width = phase.columns.count;
          row.channels = std::min(plan.channels_per_task, group_in - group_c);
          const int64_t j0 = row_block * plan.rows_per_task;
          const int64_t j1 = std::min(phase.rows.count, j0 + plan.rows_per_task);
          for (int64_t j = j0; j < j1; ++j) {
            row.source = planes + (phase.rows.packed_first + j) * packed.pitch() +
                         phase.columns.packed_first;
            row.out_at = at + (phase.rows.first + j * problem.stride_h) * destination.row_stride +
                         phase.columns.first * destination.column_stride;
            direct_row(row);
          }
        }
      }
    });
  }
}
