// The weight gradient of convolution by outer products.
//
// Pixels are the steps of the register tile (outer_product_tile.inl), and six (input
// channel, tap) pairs take the place of its pixels: a pixel's output gradients are the
// vectors that a broadcast input element is multiplied by. A sum goes over some hundred
// pixels (gradient_sum), whose gradients of a tile's channels are packed into the
// first-level cache and read there for all pairs.
//
// Pixels of channels are packed six channels at a time, [block][row][column][6]: where
// they lie, a tile would read six elements of a cache line, and lines a power of two
// apart.
//
// A task owns some input channels of a group for a slice of the sums, and packs what it
// reads. Neither the sums nor the slices depend on the number of threads, so that the
// order of a sum does not.

#include "kernels/cpu/weight_totals.inl"

// Rows and columns of an image with its border, the first ones and the steps given, as
// [block][row][column][6]; zero past the last channel.
template <class T>
void pack_channel_blocks(const T* image, const PlaneSource& source, int64_t channels,
                         const GradientAxis& row_axis, const GradientAxis& column_axis,
                         Accumulator<T>* to) {
  using A = Accumulator<T>;
  const int64_t block = row_axis.count * column_axis.count * kTilePairs;
  const int64_t blocks = ceil_div(channels, int64_t{kTilePairs});
  for (int64_t i = 0; i < row_axis.count; ++i) {
    const int64_t y = row_axis.first + i * row_axis.step;
    for (int64_t j = 0; j < column_axis.count; ++j, to += kTilePairs) {
      const int64_t x = column_axis.first + j * column_axis.step;
      if (y < 0 || y >= source.height || x < 0 || x >= source.width) {
        for (int64_t b = 0; b < blocks; ++b) std::fill_n(to + b * block, kTilePairs, A{0});
        continue;
      }
      const T* from = image + y * source.row_stride + x * source.column_stride;
      A* pixel = to;
      for (int64_t b = 0; b < channels / kTilePairs; ++b, from += kTilePairs, pixel += block) {
        A elements[kTilePairs];
#pragma GCC unroll 6
        for (int c = 0; c < kTilePairs; ++c) elements[c] = widen(from[c]);
        __builtin_memcpy(pixel, elements, sizeof elements);
      }
      if (blocks * kTilePairs == channels) continue;
      for (int64_t c = 0; c < kTilePairs; ++c) {
        pixel[c] = c < channels % kTilePairs ? widen(from[c]) : A{0};
      }
    }
  }
}

// The gradients of consecutive pixels as [pixel][KV * lanes], zero past the last channel.
template <int KV, class T>
void pack_gradients(const T* from, const PlaneSource& source, int64_t channels, int64_t pixels,
                    Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t w = 0; w < KV; ++w, from += lanes * source.channel_stride, to += lanes) {
    const int64_t count = std::min(lanes, channels - w * lanes);
    int64_t i = 0;
    if (source.channel_stride != 1) {
      for (; i + lanes <= pixels; i += lanes) {
        Vec<A> square[lanes];
#pragma GCC unroll 16
        for (int64_t c = 0; c < lanes; ++c) {
          square[c] = c < count ? load_widened(from + c * source.channel_stride + i) : Vec<A>{};
        }
        transpose<A>(square);
#pragma GCC unroll 16
        for (int64_t p = 0; p < lanes; ++p) store(to + (i + p) * KV * lanes, square[p]);
      }
      for (; i < pixels; ++i) {
        for (int64_t c = 0; c < lanes; ++c) {
          to[i * KV * lanes + c] = c < count ? widen(from[c * source.channel_stride + i]) : A{0};
        }
      }
      continue;
    }
    for (; i < pixels; ++i) {
      const T* const pixel = from + i * source.column_stride;
      store(to + i * KV * lanes, count == lanes ? load_widened(pixel) : load_head(pixel, count));
    }
  }
}

// Where a task finds pair i among its sources, and its row of totals.
struct GradientPair {
  int64_t source, row;
};

// The sums of all pairs and KV vectors over the steps, to rows of `row_length` totals:
// stored, or added to what is there. Tiles share out the lines.
template <class A, int KV>
__attribute__((noinline)) void outer_product_pairs(const A* source,
                                                   const std::vector<GradientPair>& pairs,
                                                   const OuterProductSteps<A>& steps, bool add,
                                                   A* totals, int64_t row_length,
                                                   FetchedLines lines) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = static_cast<int64_t>(pairs.size());
  const int64_t lines_of_tile = ceil_div(lines.count * kTilePairs, count);
  for (int64_t first = 0; first < count; first += kTilePairs) {
    // The last tile repeats its last pair.
    const auto pair = [&](int64_t p) -> const GradientPair& {
      return pairs[static_cast<size_t>(std::min(first + p, count - 1))];
    };
    const A* from[kTilePairs];
    for (int p = 0; p < kTilePairs; ++p) from[p] = source + pair(p).source;
    for (int64_t i = 0; i < lines_of_tile; ++i) lines.fetch_next();
    Vec<A> total[kTilePairs][KV];
    outer_product_tile(from, steps, 0, total);
    for (int p = 0; p < kTilePairs && first + p < count; ++p) {
      A* const to = totals + pair(p).row * row_length;
#pragma GCC unroll 4
      for (int w = 0; w < KV; ++w) {
        store(to + w * lanes, add ? load(to + w * lanes) + total[p][w] : total[p][w]);
      }
    }
  }
}

// Calls body(first vector, Constant<KV>) for tiles of kTilePairs by KV that registers hold.
template <class Body>
CNNK_INLINE void for_each_pair_tile(int64_t vectors, Body&& body) {
  if constexpr (CNNK_VECTOR_REGISTERS >= 32) {
    for_each_vector_tile(vectors, body);
  } else {
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) body(v, Constant<2>{});
    if (v < vectors) body(v, Constant<1>{});
  }
}

// How a task's channels lie: element (c, row, column) is at c / block * block_step +
// c % block + row * row_step + column * column_step.
struct GradientSource {
  int64_t block, block_step, row_step, column_step, image_step;
};

template <class A>
void weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output, const void* input, void* grad_weight) {
  constexpr int64_t lanes = kLanes<A>;
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const int64_t vectors = ceil_div(group_out, lanes), padded_out = vectors * lanes;
  const int64_t taps = problem.kernel_height * problem.kernel_width;
  const PlaneSource image =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const PlaneSource gradient =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);

  const GradientSum sum_of = gradient_sum(problem);
  const int64_t row_sums = ceil_div(problem.out_height, sum_of.rows);
  const int64_t sums = ceil_div(problem.batch, sum_of.images) * row_sums;
  const int64_t slices = gradient_slices(problem);
  const int64_t sum_pixels = sum_of.images * sum_of.rows * problem.out_width;

  const bool planes = problem.layout == Layout::nchw;
  const int64_t range = plan.channels_per_task;
  const GradientAxis source_columns = gradient_source_columns(problem);
  const int64_t rows = gradient_source_rows(problem).count, columns = source_columns.count;
  const int64_t row_step = plan.in_place ? 1 : gradient_source_rows(problem).step;
  const int64_t column_step = plan.in_place ? 1 : source_columns.step;
  const int64_t block = planes ? 1 : kTilePairs;
  const int64_t block_step = rows * columns * block;
  const GradientSource source =
      plan.in_place ? GradientSource{planes ? 1 : problem.in_channels, image.channel_stride,
                                     image.row_stride, image.column_stride, input_image}
                    : GradientSource{block, block_step, columns * block, block,
                                     ceil_div(range, block) * block_step};
  std::vector<int64_t> pixels;
  for (int64_t i = 0; i < sum_of.images; ++i) {
    for (int64_t y = 0; y < sum_of.rows; ++y) {
      for (int64_t x = 0; x < problem.out_width; ++x) {
        pixels.push_back(i * source.image_step + y * problem.stride_h / row_step * source.row_step +
                         x * problem.stride_w / column_step * source.column_step);
      }
    }
  }
  // The totals of pair (tap, channel) are row tap * group_in + channel. They are written in
  // the order in which most weights lie.
  std::vector<GradientWeight> weights;
  const auto add = [&](int64_t c, int64_t tap) {
    weights.push_back(
        {tap * group_in + c, c * problem.weight_stride_c +
                                 tap / problem.kernel_width * problem.weight_stride_r +
                                 tap % problem.kernel_width * problem.weight_stride_s});
  };
  const bool channels_outside = problem.weight_stride_c > problem.weight_stride_s;
  for (int64_t i = 0; i < (channels_outside ? group_in : taps); ++i) {
    for (int64_t j = 0; j < (channels_outside ? taps : group_in); ++j) {
      channels_outside ? add(i, j) : add(j, i);
    }
  }

  const int64_t totals_group = taps * group_in * padded_out;
  const int64_t totals_slice = problem.groups * totals_group;
  const Workspace totals_workspace(slices * totals_slice * static_cast<int64_t>(sizeof(A)));
  A* const totals = totals_workspace.as<A>();
  if (sums == 0) std::fill_n(totals, slices * totals_slice, A{0});
  const int64_t ranges = ceil_div(group_in, range);
  // Where there are few channels, threads share out the taps.
  const int64_t tap_ranges =
      std::min(taps, ceil_div(int64_t{plan.threads}, slices * problem.groups * ranges));
  const int64_t packed_count = plan.in_place ? 0 : sum_of.images * source.image_step;
  const int64_t tasks = slices * problem.groups * ranges * tap_ranges;
  parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace((packed_count + sum_pixels * kTileVectors * lanes) *
                              static_cast<int64_t>(sizeof(A)));
    A* const packed_data = workspace.as<A>();
    A* const gradients = packed_data + packed_count;
    std::vector<GradientPair> pairs;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / tap_ranges / ranges % problem.groups;
      const int64_t slice = task / tap_ranges / ranges / problem.groups;
      const int64_t c0 = task / tap_ranges % ranges * range;
      const int64_t channels = std::min(range, group_in - c0);
      pairs.clear();
      const int64_t tap_range = task % tap_ranges;
      for (int64_t tap = taps * tap_range / tap_ranges; tap < taps * (tap_range + 1) / tap_ranges;
           ++tap) {
        const int64_t at = tap / problem.kernel_width * problem.dilation_h * source.row_step +
                           tap % problem.kernel_width * problem.dilation_w * source.column_step;
        for (int64_t c = 0; c < channels; ++c) {
          pairs.push_back({at + c / source.block * source.block_step + c % source.block,
                           tap * group_in + c0 + c});
        }
      }
      A* const task_totals = totals + slice * totals_slice + group * totals_group;
      const int64_t first_sum = sums * slice / slices, last_sum = sums * (slice + 1) / slices;
      for (int64_t sum = first_sum; sum < last_sum; ++sum) {
        const int64_t n = sum / row_sums * sum_of.images;
        const int64_t y = sum % row_sums * sum_of.rows;
        const int64_t images = std::min(sum_of.images, problem.batch - n);
        const int64_t sum_rows = std::min(sum_of.rows, problem.out_height - y);
        const int64_t run = sum_rows * problem.out_width;
        const int64_t channel_at = (group * group_in + c0) * image.channel_stride;
        GradientAxis source_rows = gradient_source_rows(problem);
        source_rows.first += y * problem.stride_h;
        const A* from = packed_data;
        if (plan.in_place) {
          from = static_cast<const A*>(input) + n * input_image + channel_at +
                 y * problem.stride_h * image.row_stride;
        }
        for (int64_t i = 0; !plan.in_place && i < images; ++i) {
          with_storage<A>(problem.dtype, [&](auto element) {
            const auto* const first =
                static_cast<const decltype(element)*>(input) + (n + i) * input_image + channel_at;
            A* const to = packed_data + i * source.image_step;
            if (planes) {
              pack_planes(first, image, channels,
                          {-source_rows.first, problem.pad_left, rows, 1, columns}, A{0}, to);
            } else {
              pack_channel_blocks(first, image, channels, source_rows, source_columns, to);
            }
          });
        }
        for_each_pair_tile(vectors, [&](int64_t v, auto tile) {
          constexpr int KV = decltype(tile)::value;
          FetchedLines lines = {nullptr, 0};
          with_storage<A>(problem.dtype, [&](auto element) {
            using T = decltype(element);
            const T* const first = static_cast<const T*>(grad_output) + n * output_image +
                                   y * gradient.row_stride +
                                   (group * group_out + v * lanes) * gradient.channel_stride;
            for (int64_t i = 0; i < images; ++i) {
              pack_gradients<KV>(first + i * output_image, gradient, group_out - v * lanes, run,
                                 gradients + i * run * KV * lanes);
            }
            if (planes) return;
            if (v + KV < vectors) {
              // The next vectors: no prefetcher of the processor's goes so far from line to
              // line.
              lines = {reinterpret_cast<const char*>(first + KV * lanes), images * run,
                       gradient.column_stride * static_cast<int64_t>(sizeof(T))};
            } else if (sum + 1 < last_sum && channels == problem.in_channels) {
              // The rows that the next sum reads, which follow those of this one.
              const int64_t elements = images * sum_rows * problem.stride_h * image.row_stride;
              lines = {static_cast<const char*>(input) +
                           (n * input_image + y * problem.stride_h * image.row_stride + elements) *
                               static_cast<int64_t>(sizeof(T)),
                       elements * static_cast<int64_t>(sizeof(T)) / 64};
            }
          });
          outer_product_pairs<A, KV>(from, pairs,
                                     {pixels.data(), images * run, gradients, lanes, KV * lanes},
                                     sum > first_sum, task_totals + v * lanes, padded_out, lines);
        });
      }
    }
  });

  parallel_for(pool, problem.groups * vectors, serial, [&](int64_t begin, int64_t end) {
    with_storage<A>(problem.dtype, [&](auto element) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / vectors, k = task % vectors * lanes;
        write_totals(totals + group * totals_group + k, padded_out, slices, totals_slice, weights,
                     std::min(lanes, group_out - k),
                     static_cast<decltype(element)*>(grad_weight) +
                         (group * group_out + k) * problem.weight_stride_k,
                     problem.weight_stride_k);
      }
    });
  });
}
