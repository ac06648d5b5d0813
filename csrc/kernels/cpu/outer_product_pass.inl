// What the passes of outer-product convolution share: the bordered source, the
// order of the steps, the panels of weights, and the loop of a forward pass.

#include "kernels/cpu/outer_product_tile.inl"
#include "kernels/cpu/pack_planes.inl"
#include "kernels/cpu/widened_weights.inl"

// Images with their border, dense in a layout; steps in elements.
struct BorderedImages {
  Layout layout;
  int64_t channels, rows, columns;
  int64_t row, column, channel, image;
};

inline BorderedImages bordered_images(Layout layout, int64_t channels, int64_t rows,
                                      int64_t columns) {
  const PlaneSource dense = plane_source(layout, channels, rows, columns);
  return {layout,
          channels,
          rows,
          columns,
          dense.row_stride,
          dense.column_stride,
          dense.channel_stride,
          image_stride(channels, rows, columns)};
}

// What the tasks of a pass read. In place, `images` are those in memory; else a task packs
// the rows that it reads, with their border of zeros, as `images` says.
struct PassSource {
  DType dtype;
  const void* data;
  int64_t height, width;
  int64_t top, left;  // border
  int64_t row_step;   // rows of the source from one row of results to the next
  bool in_place;
  BorderedImages images;
};

template <class A>
void pack_rows(const PassSource& source, int64_t image, int64_t first_row, A* out) {
  // A row of pixels of channels is packed as one wide row of one plane.
  const BorderedImages& to = source.images;
  const bool planes = to.layout == Layout::nchw;
  const int64_t pixel = planes ? 1 : to.channels;
  const PlaneSource from = {source.height, source.width * pixel, source.height * source.width,
                            source.width * pixel, 1};
  const PackedPlanes packed = {source.top - first_row, source.left * pixel, to.rows, 1,
                               to.columns * pixel};
  pack_planes_as<A>(source.dtype, source.data,
                    image * image_stride(to.channels, source.height, source.width), from,
                    planes ? to.channels : 1, packed, A{0}, out);
}

// Rows [y0, y1) of an image's results, of one part of their channels.
template <class A>
struct RowTask {
  int64_t image, part;
  int64_t y0, y1;
  const A* source;  // of the first channel and column, in the first row that y0 reads
};

// Calls body(task) in parallel for tasks of plan.rows_per_task rows. The parts of the same
// rows follow one another and read what has been packed once.
template <class A, class Body>
void for_each_row_task(const Conv2dPlan& plan, const ThreadPool& pool, const PassSource& source,
                       int64_t batch, int64_t rows, int64_t parts, Body&& body) {
  const BorderedImages& images = source.images;
  const int64_t blocks = ceil_div(rows, plan.rows_per_task);
  parallel_for(pool, batch * blocks * parts, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace(source.in_place ? 0 : images.image * static_cast<int64_t>(sizeof(A)));
    A* const packed = workspace.as<A>();
    for (int64_t i = begin; i < end; ++i) {
      RowTask<A> task = {i / parts / blocks, i % parts, i / parts % blocks * plan.rows_per_task, 0,
                         packed};
      task.y1 = std::min(rows, task.y0 + plan.rows_per_task);
      const int64_t first_row = task.y0 * source.row_step;
      if (source.in_place) {
        task.source =
            static_cast<const A*>(source.data) + task.image * images.image + first_row * images.row;
      } else if (i == begin || task.part == 0) {
        pack_rows(source, task.image, first_row, packed);
      }
      body(task);
    }
  });
}

// The forward pass's steps: of the source and of the weights, in the order in
// which the source lies in memory.
struct ForwardSteps {
  std::vector<int64_t> source, weight;
};

template <class Weights>
ForwardSteps forward_steps(const Conv2dProblem& problem, const BorderedImages& images,
                           const Weights& weights) {
  ForwardSteps steps;
  const int64_t channels = problem.in_channels / problem.groups;
  const auto add = [&](int64_t c, int64_t r, int64_t s) {
    steps.source.push_back(c * images.channel + r * problem.dilation_h * images.row +
                           s * problem.dilation_w * images.column);
    steps.weight.push_back(c * weights.stride_c + r * weights.stride_r + s * weights.stride_s);
  };
  const bool channels_outside = problem.layout == Layout::nchw;
  for (int64_t c0 = 0; c0 < (channels_outside ? channels : 1); ++c0) {
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      for (int64_t s = 0; s < problem.kernel_width; ++s) {
        for (int64_t c = 0; c < (channels_outside ? 1 : channels); ++c) add(c0 + c, r, s);
      }
    }
  }
  return steps;
}

// Strides of a weight in place.
struct WeightStrides {
  int64_t stride_k, stride_c, stride_r, stride_s;
};

inline WeightStrides weight_strides(const Conv2dProblem& problem) {
  return {problem.weight_stride_k, problem.weight_stride_c, problem.weight_stride_r,
          problem.weight_stride_s};
}

// All groups' panels, one after the other, packed in parallel.
template <class A>
void pack_group_panels(const ThreadPool& pool, bool serial, DType dtype, const void* weight,
                       int64_t groups, int64_t group_step, int64_t channels, int64_t channel_step,
                       const std::vector<int64_t>& steps, A* panels) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t vectors = ceil_div(channels, lanes);
  const int64_t panel = lanes * static_cast<int64_t>(steps.size());
  parallel_for(pool, groups * vectors, serial, [&](int64_t begin, int64_t end) {
    with_storage<A>(dtype, [&](auto element) {
      const auto* const first = static_cast<const decltype(element)*>(weight);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i % vectors * lanes;
        pack_panels(first + i / vectors * group_step + k * channel_step,
                    std::min(lanes, channels - k), channel_step, steps, panels + i * panel);
      }
    });
  });
}

// What the forward pass reads for rows of results, each of `outputs` rows of outputs.
inline PassSource forward_source(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                 const void* input, int64_t outputs) {
  const int64_t rows = (plan.rows_per_task * outputs - 1) * problem.stride_h +
                       (problem.kernel_height - 1) * problem.dilation_h + 1;
  const int64_t columns = packed_input(problem, 1).row_length;
  return {problem.dtype,
          input,
          problem.in_height,
          problem.in_width,
          problem.pad_top,
          problem.pad_left,
          outputs * problem.stride_h,
          plan.in_place,
          plan.in_place ? bordered_images(problem.layout, problem.in_channels, problem.in_height,
                                          problem.in_width)
                        : bordered_images(problem.layout, problem.in_channels, rows, columns)};
}

// What a task of a forward pass computes: rows of some channels of a group.
template <class A>
struct ForwardTask {
  OuterProductSteps<A> steps;
  const A* source;   // of the group's first channel, in the first row that y0 reads
  const A* bias;     // of the first channel, or null
  int64_t image;     // of the batch
  int64_t channel;   // the first
  int64_t channels;  // how many
  int64_t y0, y1;
};

// Packs the weights and calls body(task) in parallel for tasks that cut `rows` rows.
template <class A, class Body>
void forward_pass(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                  const PassSource& source, const void* weight, const void* bias_data, int64_t rows,
                  Body&& body) {
  constexpr int64_t lanes = kLanes<A>;
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const WeightStrides weights = weight_strides(problem);
  const ForwardSteps list = forward_steps(problem, source.images, weights);
  const int64_t steps = static_cast<int64_t>(list.source.size());
  const int64_t group_panels = round_up(group_out, lanes) * steps;

  const Workspace workspace((problem.groups * group_panels + problem.out_channels) *
                            static_cast<int64_t>(sizeof(A)));
  A* const panels = workspace.as<A>();
  const A* const bias = widened_bias<A>(problem.dtype, bias_data, problem.out_channels,
                                        panels + problem.groups * group_panels);
  pack_group_panels(pool, serial, problem.dtype, weight, problem.groups,
                    group_out * weights.stride_k, group_out, weights.stride_k, list.weight, panels);

  const int64_t ranges = ceil_div(group_out, plan.channels_per_task);
  for_each_row_task<A>(
      plan, pool, source, problem.batch, rows, problem.groups * ranges,
      [&](const RowTask<A>& task) {
        const int64_t group = task.part / ranges;
        const int64_t k = task.part % ranges * plan.channels_per_task;
        const int64_t channel = group * group_out + k;
        body(ForwardTask<A>{{list.source.data(), steps, panels + group * group_panels + k * steps,
                             steps * lanes, lanes},
                            task.source + group * group_in * source.images.channel,
                            bias != nullptr ? bias + channel : nullptr,
                            task.image,
                            channel,
                            std::min(plan.channels_per_task, group_out - k),
                            task.y0,
                            task.y1});
      });
}
