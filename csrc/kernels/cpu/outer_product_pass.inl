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

// Copies one image of height x width, which starts at element `at`, into a
// border of zeros.
template <class A>
void pack_bordered(DType dtype, const void* images, int64_t at, int64_t height, int64_t width,
                   int64_t top, int64_t left, const BorderedImages& to, A* out) {
  // A row of pixels of channels is packed as one wide row of one plane.
  const bool planes = to.layout == Layout::nchw;
  const int64_t pixel = planes ? 1 : to.channels;
  const PlaneSource source = {height, width * pixel, height * width, width * pixel, 1};
  const PackedPlanes packed = {top, left * pixel, to.rows, 1, to.columns * pixel};
  pack_planes_as<A>(dtype, images, at, source, planes ? to.channels : 1, packed, A{0}, out);
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

// The bordered images that the forward pass and the weight gradient read.
inline BorderedImages forward_images(const Conv2dProblem& problem, bool in_place) {
  const PackedPlanes packed = packed_input(problem, 1);
  return in_place
             ? bordered_images(problem.layout, problem.in_channels, problem.in_height,
                               problem.in_width)
             : bordered_images(problem.layout, problem.in_channels, packed.rows, packed.row_length);
}

// What a task of a forward pass computes: rows [y0, y1) of one image and group.
template <class A>
struct ForwardTask {
  OuterProductSteps<A> steps;
  const A* source;  // of the first input channel, row 0
  const A* bias;    // of the first output channel, or null
  int64_t image;    // of the batch
  int64_t channel;  // the first output channel
  int64_t y0, y1;
};

// Packs what needs packing and calls body(task) in parallel for tasks that cut
// `rows` rows into plan.rows_per_task.
template <class A, class Body>
void forward_pass(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                  const BorderedImages& images, const void* input, const void* weight,
                  const void* bias_data, int64_t rows, Body&& body) {
  constexpr int64_t lanes = kLanes<A>;
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const WeightStrides weights = weight_strides(problem);
  const ForwardSteps list = forward_steps(problem, images, weights);
  const int64_t steps = static_cast<int64_t>(list.source.size());
  const int64_t group_panels = round_up(group_out, lanes) * steps;

  const int64_t packed_count = plan.in_place ? 0 : plan.images_per_chunk * images.image;
  const Workspace workspace((problem.groups * group_panels + packed_count + problem.out_channels) *
                            static_cast<int64_t>(sizeof(A)));
  A* const panels = workspace.as<A>();
  A* const packed_data = panels + problem.groups * group_panels;
  const A* const bias =
      widened_bias<A>(problem.dtype, bias_data, problem.out_channels, packed_data + packed_count);
  pack_group_panels(pool, serial, problem.dtype, weight, problem.groups,
                    group_out * weights.stride_k, group_out, weights.stride_k, list.weight, panels);

  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t row_blocks = ceil_div(rows, plan.rows_per_task);
  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t chunk = std::min(plan.images_per_chunk, problem.batch - n0);
    if (!plan.in_place) {
      parallel_for(pool, chunk, serial, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          pack_bordered<A>(problem.dtype, input, (n0 + i) * input_image, problem.in_height,
                           problem.in_width, problem.pad_top, problem.pad_left, images,
                           packed_data + i * images.image);
        }
      });
    }
    const A* const source =
        plan.in_place ? static_cast<const A*>(input) + n0 * input_image : packed_data;
    const int64_t tasks = chunk * problem.groups * row_blocks;
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y0 = i % row_blocks * plan.rows_per_task;
        const int64_t group = i / row_blocks % problem.groups;
        const int64_t image = i / row_blocks / problem.groups;
        const int64_t channel = group * group_out;
        body(ForwardTask<A>{
            {list.source.data(), steps, panels + group * group_panels, steps * lanes, lanes},
            source + image * images.image + group * group_in * images.channel,
            bias != nullptr ? bias + channel : nullptr,
            n0 + image,
            channel,
            y0,
            std::min(rows, y0 + plan.rows_per_task)});
      }
    });
  }
}
