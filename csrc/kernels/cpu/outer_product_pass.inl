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

// The weights of a pass: those of a group, and of a channel of the results.
struct PassWeights {
  const void* data;
  int64_t groups, group_step;
  int64_t channels, channel_step;
};

// What a task computes: rows [y0, y1) of some channels of a group of an image.
template <class A>
struct PassTask {
  int64_t image, group;
  int64_t channel, channels;  // the first, of those of the group, and how many
  int64_t y0, y1;
  const A* source;  // of the first channel and column, in the first row that y0 reads
  const A* panels;  // all classes'
};

// The loop over tasks. A class of results has its own steps; `weight_steps` has those of the
// weights, and a panel is packed for each. Either all panels are packed first, and tasks go
// over rows, of which they pack the source: the parts of the channels of the same rows
// follow one another and read what has been packed once. Or, with weights first, all sources
// are packed, and a task packs the panels of its part of the channels for itself and goes
// over all rows: so it is for few pixels, whose panels would not stay in a cache.
template <class A, class Body>
void outer_product_pass(const Conv2dPlan& plan, const ThreadPool& pool, const PassSource& source,
                        const PassWeights& weights,
                        const std::vector<const std::vector<int64_t>*>& weight_steps, int64_t batch,
                        int64_t rows, Body&& body) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int64_t size = static_cast<int64_t>(sizeof(A));
  const bool serial = plan.threads == 1;
  const BorderedImages& images = source.images;
  const int64_t part_vectors = ceil_div(plan.channels_per_task, lanes);
  const int64_t group_parts = ceil_div(weights.channels, plan.channels_per_task);
  const int64_t parts = weights.groups * group_parts;
  int64_t part_elements = 0;
  for (const auto* steps : weight_steps) {
    part_elements += part_vectors * lanes * static_cast<int64_t>(steps->size());
  }
  // Packs vector v of a part, of which `to` are the panels.
  const auto pack_vector = [&](int64_t part, int64_t v, A* to) {
    const int64_t group = part / group_parts;
    const int64_t k = part % group_parts * plan.channels_per_task + v * lanes;
    if (k >= weights.channels) return;
    with_storage<A>(source.dtype, [&](auto element) {
      const auto* const first = static_cast<const decltype(element)*>(weights.data) +
                                group * weights.group_step + k * weights.channel_step;
      for (const auto* steps : weight_steps) {
        const int64_t panel = lanes * static_cast<int64_t>(steps->size());
        pack_panels(first, std::min(lanes, weights.channels - k), weights.channel_step, *steps,
                    to + v * panel);
        to += part_vectors * panel;
      }
    });
  };
  const auto part_task = [&](int64_t image, int64_t part, int64_t y0, const A* packed,
                             const A* panels) {
    const int64_t k = part % group_parts * plan.channels_per_task;
    const int64_t first_row = y0 * source.row_step;
    const A* const from = source.in_place ? static_cast<const A*>(source.data) +
                                                image * images.image + first_row * images.row
                                          : packed;
    body(PassTask<A>{image, part / group_parts, k,
                     std::min(plan.channels_per_task, weights.channels - k), y0,
                     std::min(rows, y0 + plan.rows_per_task), from, panels});
  };

  if (plan.weights_first) {
    const Workspace source_workspace(source.in_place ? 0 : batch * images.image * size);
    A* const packed = source_workspace.as<A>();
    if (!source.in_place) {
      parallel_for(pool, batch, serial, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pack_rows(source, i, 0, packed + i * images.image);
      });
    }
    parallel_for(pool, parts, serial, [&](int64_t begin, int64_t end) {
      const Workspace workspace(part_elements * size);
      A* const panels = workspace.as<A>();
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t v = 0; v < part_vectors; ++v) pack_vector(part, v, panels);
        for (int64_t i = 0; i < batch; ++i) {
          part_task(i, part, 0, packed + i * images.image, panels);
        }
      }
    });
    return;
  }

  const Workspace panel_workspace(parts * part_elements * size);
  A* const panels = panel_workspace.as<A>();
  parallel_for(pool, parts * part_vectors, serial, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_vector(i / part_vectors, i % part_vectors, panels + i / part_vectors * part_elements);
    }
  });
  const int64_t blocks = ceil_div(rows, plan.rows_per_task);
  parallel_for(pool, batch * blocks * parts, serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace(source.in_place ? 0 : images.image * size);
    A* const packed = workspace.as<A>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts / blocks, part = i % parts;
      const int64_t y0 = i / parts % blocks * plan.rows_per_task;
      if (!source.in_place && (i == begin || part == 0)) {
        pack_rows(source, image, y0 * source.row_step, packed);
      }
      part_task(image, part, y0, packed, panels + part * part_elements);
    }
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

// What a task of a forward pass computes.
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

// Calls body(task) in parallel for tasks that cut `rows` rows.
template <class A, class Body>
void forward_pass(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                  const PassSource& source, const void* weight, const void* bias_data, int64_t rows,
                  Body&& body) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const WeightStrides strides = weight_strides(problem);
  const ForwardSteps list = forward_steps(problem, source.images, strides);
  const int64_t steps = static_cast<int64_t>(list.source.size());
  const Workspace workspace(problem.out_channels * static_cast<int64_t>(sizeof(A)));
  const A* const bias =
      widened_bias<A>(problem.dtype, bias_data, problem.out_channels, workspace.as<A>());
  outer_product_pass<A>(
      plan, pool, source,
      {weight, problem.groups, group_out * strides.stride_k, group_out, strides.stride_k},
      {&list.weight}, problem.batch, rows, [&](const PassTask<A>& task) {
        const int64_t channel = task.group * group_out + task.channel;
        body(ForwardTask<A>{{list.source.data(), steps, task.panels, steps * lanes, lanes},
                            task.source + task.group * group_in * source.images.channel,
                            bias != nullptr ? bias + channel : nullptr,
                            task.image,
                            channel,
                            task.channels,
                            task.y0,
                            task.y1});
      });
}
