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
// gradient is the same with pixels as steps and the (input channel, tap) pairs
// in the place of pixels: a pixel's output gradients are the vectors. Its tasks
// own their elements over all images, so that a sum has one order whatever the
// number of threads; an image's sum goes to totals in double.

#include "kernels/cpu/conv2d_outer_product_block.inl"

// Pixels of a chain of the weight gradient: shorter than elsewhere, since there is one
// chain a sum, where dot products have one in every lane.
constexpr int64_t kPixelsPerChain = 32;

template <class A>
void forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
             const void* input, const void* weight, const void* bias, void* output) {
  const BorderedImages images = forward_images(problem, plan.in_place);
  const PlaneSource destination =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
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
                        destination.column_stride};
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
                           problem.stride_w * destination.column_stride};
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

// One image's output gradients of one group as panels [vector][pixel][lane], a vector's
// `panel` elements apart, zero past the last channel.
template <class A>
void pack_gradient_panels(DType dtype, const void* grad_output, int64_t at,
                          const PlaneSource& source, int64_t channels, int64_t panel, A* panels) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t pixels = source.height * source.width;
  with_storage<A>(dtype, [&](auto element) {
    const auto* const from = static_cast<const decltype(element)*>(grad_output) + at;
    if (source.channel_stride == 1) {
      for (int64_t i = 0; i < pixels; ++i) {
        const auto* const pixel = from + i * source.column_stride;
        A* to = panels + i * lanes;
        int64_t k = 0;
        for (; k + lanes <= channels; k += lanes, to += panel) store(to, load_widened(pixel + k));
        if (k < channels) store(to, load_head(pixel + k, channels - k));
      }
      return;
    }
    for (int64_t k = 0; k < channels; k += lanes) {
      const int64_t count = std::min(lanes, channels - k);
      A* const to = panels + k / lanes * panel;
      int64_t i = 0;
      for (; i + lanes <= pixels; i += lanes) {
        Vec<A> rows[lanes];
#pragma GCC unroll 16
        for (int64_t c = 0; c < lanes; ++c) {
          rows[c] = c < count ? load_widened(from + (k + c) * source.channel_stride + i) : Vec<A>{};
        }
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int64_t p = 0; p < lanes; ++p) store(to + (i + p) * lanes, rows[p]);
      }
      for (; i < pixels; ++i) {
        for (int64_t c = 0; c < lanes; ++c) {
          to[i * lanes + c] = c < count ? widen(from[(k + c) * source.channel_stride + i]) : A{0};
        }
      }
    }
  });
}

// totals[pair][channel] += the outer products of pairs [first, first + P), up to
// `last`, and KV vectors, over the steps.
template <class A, int KV>
__attribute__((noinline)) void outer_product_pairs(const A* source,
                                                   const std::vector<int64_t>& pairs, int64_t first,
                                                   int64_t last, const OuterProductSteps<A>& steps,
                                                   int64_t v, double* totals, int64_t totals_row) {
  constexpr int P = kTilePixels<KV>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = std::min<int64_t>(P, last - first);
  const A* from[P];
  for (int p = 0; p < P; ++p) {
    from[p] = source + pairs[static_cast<size_t>(first + std::min<int64_t>(p, count - 1))];
  }
  Vec<A> total[P][KV];
  outer_product_tile<A, KV, P, kPixelsPerChain>(from, steps, v, total);
  for (int64_t p = 0; p < count; ++p) {
    A values[KV * lanes];
    for (int w = 0; w < KV; ++w) store(values + w * lanes, total[p][w]);
    double* const to = totals + (first + p) * totals_row + v * lanes;
    for (int64_t i = 0; i < KV * lanes; ++i) to[i] += values[i];
  }
}

template <class A>
void weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output, const void* input, void* grad_weight) {
  constexpr int64_t lanes = kLanes<A>;
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const int64_t padded_out = round_up(group_out, lanes);
  const int64_t pixels = problem.out_height * problem.out_width;
  const BorderedImages images = forward_images(problem, plan.in_place);
  const PlaneSource gradients =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  // Pixels of whole vectors of channels are panels as they lie; but they fall onto few
  // sets of the cache, so that many pairs are worth a copy.
  constexpr int64_t kManyPairs = 256;
  const bool gradient_in_place =
      !widens(problem.dtype) && problem.layout == Layout::nhwc && group_out % lanes == 0 &&
      group_in * problem.kernel_height * problem.kernel_width < kManyPairs;
  const int64_t gradient_image =
      gradient_in_place ? problem.out_channels * pixels : problem.groups * padded_out * pixels;

  // The pairs take the place of pixels, whole rows of pixels that of steps.
  const ForwardSteps list = forward_steps(problem, images, weight_strides(problem));
  const int64_t pairs = static_cast<int64_t>(list.source.size());
  // A sum goes over rows of an image, or over whole images where they are small.
  const auto [images_per_sum, rows_per_sum] = gradient_sum(problem);
  const int64_t row_sums = ceil_div(problem.out_height, rows_per_sum);
  std::vector<int64_t> pixel_offsets;
  for (int64_t image = 0; image < std::min(images_per_sum, plan.images_per_chunk); ++image) {
    for (int64_t y = 0; y < rows_per_sum; ++y) {
      for (int64_t x = 0; x < problem.out_width; ++x) {
        pixel_offsets.push_back(image * images.image + y * problem.stride_h * images.row +
                                x * problem.stride_w * images.column);
      }
    }
  }
  // Where totals are small, slices of the sums have their own, as many as keep some
  // threads busy. The sums' order must not depend on the number of threads, and so
  // neither does the number of slices.
  constexpr int64_t kMostSlices = 8, kMostElements = 128 * 1024;
  const int64_t totals_group = pairs * padded_out;
  const int64_t totals_slice = problem.groups * totals_group;
  const int64_t slices = std::clamp<int64_t>(kMostElements / totals_slice, 1, kMostSlices);
  // A task has some pairs of a group, in whole tiles of the commonest width.
  constexpr int64_t kPairTile = kTilePixels<2>;
  const int64_t pair_tasks = ceil_div(4 * plan.threads, slices * problem.groups);
  const int64_t pairs_per_task = round_up(ceil_div(pairs, pair_tasks), kPairTile);
  const int64_t pair_ranges = ceil_div(pairs, pairs_per_task);

  const int64_t packed_count = plan.in_place ? 0 : plan.images_per_chunk * images.image;
  const int64_t gradient_count = gradient_in_place ? 0 : plan.images_per_chunk * gradient_image;
  const Workspace workspace((packed_count + gradient_count) * static_cast<int64_t>(sizeof(A)));
  A* const packed_data = workspace.as<A>();
  A* const gradient_data = packed_data + packed_count;
  const Workspace totals_workspace(slices * totals_slice * static_cast<int64_t>(sizeof(double)));
  double* const totals = totals_workspace.as<double>();
  if (problem.batch == 0) std::fill_n(totals, slices * totals_slice, 0.0);

  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image = problem.out_channels * pixels;
  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t chunk = std::min(plan.images_per_chunk, problem.batch - n0);
    if (!plan.in_place || !gradient_in_place) {
      parallel_for(pool, chunk, serial, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (!plan.in_place) {
            pack_bordered<A>(problem.dtype, input, (n0 + i) * input_image, problem.in_height,
                             problem.in_width, problem.pad_top, problem.pad_left, images,
                             packed_data + i * images.image);
          }
          for (int64_t group = 0; !gradient_in_place && group < problem.groups; ++group) {
            pack_gradient_panels<A>(
                problem.dtype, grad_output,
                (n0 + i) * output_image + group * group_out * gradients.channel_stride, gradients,
                group_out, plan.images_per_chunk * pixels * lanes,
                gradient_data + group * padded_out * plan.images_per_chunk * pixels +
                    i * pixels * lanes);
          }
        }
      });
    }
    const A* const source =
        plan.in_place ? static_cast<const A*>(input) + n0 * input_image : packed_data;
    const A* const gradient =
        gradient_in_place ? static_cast<const A*>(grad_output) + n0 * output_image : gradient_data;
    const int64_t tasks = slices * problem.groups * pair_ranges;
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / pair_ranges % problem.groups;
        const int64_t slice = task / pair_ranges / problem.groups;
        double* const task_totals = totals + slice * totals_slice + group * totals_group;
        const int64_t pair_begin = task % pair_ranges * pairs_per_task;
        const int64_t pair_end = std::min(pairs, pair_begin + pairs_per_task);
        if (n0 == 0) {
          std::fill_n(task_totals + pair_begin * padded_out, (pair_end - pair_begin) * padded_out,
                      0.0);
        }
        for (int64_t image = 0; image < chunk; image += images_per_sum) {
          const int64_t sum_images = std::min(images_per_sum, chunk - image);
          for (int64_t y = 0; y < problem.out_height; y += rows_per_sum) {
            const int64_t sum = (n0 + image) / images_per_sum * row_sums + y / rows_per_sum;
            if (sum % slices != slice) continue;
            const int64_t first = image * pixels + y * problem.out_width;
            OuterProductSteps<A> steps;
            steps.offsets = pixel_offsets.data();
            steps.count =
                sum_images * std::min(rows_per_sum, problem.out_height - y) * problem.out_width;
            if (gradient_in_place) {
              steps.panels = gradient + first * problem.out_channels + group * group_out;
              steps.panel = lanes;
              steps.step = problem.out_channels;
            } else {
              steps.panel = plan.images_per_chunk * pixels * lanes;
              steps.panels = gradient + group * padded_out / lanes * steps.panel + first * lanes;
              steps.step = lanes;
            }
            const A* const from = source + image * images.image +
                                  group * group_in * images.channel +
                                  y * problem.stride_h * images.row;
            for_each_vector_tile(padded_out / lanes, [&](int64_t v, auto vectors) {
              constexpr int KV = decltype(vectors)::value;
              for (int64_t pair = pair_begin; pair < pair_end; pair += kTilePixels<KV>) {
                outer_product_pairs<A, KV>(from, list.source, pair, pair_end, steps, v, task_totals,
                                           padded_out);
              }
            });
          }
        }
      }
    });
  }

  // The totals of a vector of output channels become rows of as many output channels.
  const int64_t vectors = padded_out / lanes;
  parallel_for(pool, problem.groups * vectors, serial, [&](int64_t begin, int64_t end) {
    with_storage<A>(problem.dtype, [&](auto element) {
      using T = decltype(element);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / vectors, k = task % vectors * lanes;
        const int64_t count = std::min(lanes, group_out - k);
        const double* const from = totals + group * totals_group + k;
        T* const to =
            static_cast<T*>(grad_weight) + (group * group_out + k) * problem.weight_stride_k;
        for (int64_t i = 0; i < pairs; ++i) {
          T* const at = to + list.weight[static_cast<size_t>(i)];
          for (int64_t lane = 0; lane < count; ++lane) {
            double total = from[i * padded_out + lane];
            for (int64_t slice = 1; slice < slices; ++slice) {
              total += from[slice * totals_slice + i * padded_out + lane];
            }
            at[lane * problem.weight_stride_k] = narrow<T>(static_cast<A>(total));
          }
        }
      }
    });
  });
}
