// Weight gradient of direct convolution: dot products of output-gradient rows
// with shifted input rows.
//
// KB output channels by TB (input channel, tap) pairs of sums live in
// registers, each a vector over output columns; a step loads KB gradient and TB
// source vectors for KB*TB multiply-adds, without a broadcast. 4x3 sums and
// their operands are what 16 registers hold. Lanes are summed every
// kStepsPerSum steps, over rows and images: often enough to keep float's chains
// short, seldom enough not to cost. Narrow vectors hold fewer chains, which have
// to be shorter, and cost less to sum.
//
// A task owns its gradient elements over all images, so that the sum has one
// order whatever the number of threads, and nothing needs to be reduced.
// Lane sums are added up in double.

#include "kernels/cpu/pack_planes.inl"

constexpr int kGradientChannels = 4;
constexpr int kGradientTaps = 3;
constexpr int64_t kStepsPerSum = 2 * CNNK_VECTOR_BYTES;

// The rows of packed images that one lane sum runs over.
template <class A>
struct PackedImages {
  const A* gradient;  // of the tile's first output channel
  int64_t gradient_image, gradient_plane, gradient_pitch;
  const A* planes;
  int64_t source_image, source_pitch;
  int64_t row_begin, row_end;  // over all images
  int64_t rows, columns;       // of an image
};

// Sums for KB channels and TB taps, added to `sums` [channel][tap] with the row
// length given.
template <class A, int KB, int TB>
void weight_gradient_tile(const PackedImages<A>& packed, const int64_t* offsets, double* sums,
                          int64_t sums_row) {
  const int64_t columns = packed.columns;
  const int64_t gradient_plane = packed.gradient_plane;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = columns / lanes * lanes;
  const Vec<Mask<A>> tail = first_lanes<A>(columns - whole);
  Vec<A> sum[KB][TB];
  for (int k = 0; k < KB; ++k) {
    for (int t = 0; t < TB; ++t) sum[k][t] = Vec<A>{};
  }
  for (int64_t row = packed.row_begin; row < packed.row_end; ++row) {
    const int64_t image = row / packed.rows;
    const int64_t y = row - image * packed.rows;
    const A* const gradient_row =
        packed.gradient + image * packed.gradient_image + y * packed.gradient_pitch;
    const A* const source_row =
        packed.planes + image * packed.source_image + y * packed.source_pitch;
    for (int64_t x = 0; x < whole; x += lanes) {
      Vec<A> value[TB];
#pragma GCC unroll 4
      for (int t = 0; t < TB; ++t) value[t] = load(source_row + offsets[t] + x);
#pragma GCC unroll 4
      for (int k = 0; k < KB; ++k) {
        const Vec<A> g = load(gradient_row + k * gradient_plane + x);
#pragma GCC unroll 4
        for (int t = 0; t < TB; ++t) sum[k][t] += g * value[t];
      }
    }
    if (whole < columns) {
      // Past the end lie other columns of the source, which may be infinite:
      // a zero gradient alone would make NaN of them.
      Vec<A> value[TB];
#pragma GCC unroll 4
      for (int t = 0; t < TB; ++t) {
        value[t] = select<A>(tail, load(source_row + offsets[t] + whole), Vec<A>{});
      }
#pragma GCC unroll 4
      for (int k = 0; k < KB; ++k) {
        const Vec<A> g = load(gradient_row + k * gradient_plane + whole);
#pragma GCC unroll 4
        for (int t = 0; t < TB; ++t) sum[k][t] += g * value[t];
      }
    }
  }
  for (int k = 0; k < KB; ++k) {
    for (int t = 0; t < TB; ++t) sums[k * sums_row + t] += sum_lanes<A>(sum[k][t]);
  }
}

template <class A, int KB>
void weight_gradient_taps(const PackedImages<A>& packed, const std::vector<int64_t>& offsets,
                          double* sums, int64_t sums_row) {
  const int64_t taps = static_cast<int64_t>(offsets.size());
  int64_t t = 0;
  const auto tile = [&](auto taps_at_once) {
    constexpr int TB = decltype(taps_at_once)::value;
    weight_gradient_tile<A, KB, TB>(packed, offsets.data() + t, sums + t, sums_row);
    t += TB;
  };
  while (taps - t >= kGradientTaps) tile(Constant<kGradientTaps>{});
  while (taps - t >= 2) tile(Constant<2>{});
  while (taps - t >= 1) tile(Constant<1>{});
}

template <class T>
void weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output_data, const void* input_data, void* grad_weight_data) {
  using A = Accumulator<T>;
  const T* const grad_output = static_cast<const T*>(grad_output_data);
  const T* const input = static_cast<const T*>(input_data);
  T* const grad_weight = static_cast<T*>(grad_weight_data);
  const bool serial = plan.threads == 1;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const int64_t kernel = problem.kernel_height * problem.kernel_width;

  const PackedPlanes packed_in = packed_input(problem, problem.stride_w);
  PackedPlanes packed_out;
  packed_out.top = 0;
  packed_out.left = 0;
  packed_out.rows = problem.out_height;
  packed_out.phases = 1;
  packed_out.row_length = round_up(problem.out_width, kLanes<A>);

  const int64_t in_image = problem.in_channels * packed_in.plane();
  const int64_t out_image = problem.out_channels * packed_out.plane();
  const int64_t in_count = plan.images_per_chunk * in_image + kLanes<A>;
  const int64_t out_count = plan.images_per_chunk * out_image;
  const Workspace workspace((in_count + out_count) * static_cast<int64_t>(sizeof(A)));
  A* const packed_gradient = workspace.as<A>();
  A* const packed_source = packed_gradient + out_count;
  const Workspace sums_workspace(problem.out_channels * group_in * kernel *
                                 static_cast<int64_t>(sizeof(double)));
  double* const sums = sums_workspace.as<double>();

  // A task: a few output channels by a block of input channels with all taps.
  const std::vector<Tap> taps = forward_taps(problem, packed_in, 0, 0);
  const int64_t k_blocks = ceil_div(group_out, kGradientChannels);
  const int64_t c_block = std::min(group_in, std::max<int64_t>(1, ceil_div(32, kernel)));
  const int64_t c_blocks = ceil_div(group_in, c_block);
  const int64_t tasks = problem.groups * k_blocks * c_blocks;
  const int64_t sums_row = group_in * kernel;
  const int64_t rows_per_sum =
      std::max<int64_t>(1, kStepsPerSum / ceil_div(problem.out_width, kLanes<A>));

  const PlaneSource in_source =
      plane_source(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const PlaneSource out_source =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t input_image =
      image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t output_image =
      image_stride(problem.out_channels, problem.out_height, problem.out_width);
  const int64_t in_blocks = ceil_div(problem.in_channels, kInterleavedChannels);
  const int64_t out_blocks = ceil_div(problem.out_channels, kInterleavedChannels);
  const int64_t pack_tasks = in_blocks + out_blocks;

  std::fill(sums, sums + problem.out_channels * sums_row, 0.0);
  for (int64_t n0 = 0; n0 < problem.batch; n0 += plan.images_per_chunk) {
    const int64_t images = std::min(plan.images_per_chunk, problem.batch - n0);
    parallel_for(pool, images * pack_tasks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / pack_tasks;
        const int64_t block = i % pack_tasks;
        if (block < in_blocks) {
          const int64_t c0 = block * kInterleavedChannels;
          pack_planes(input + (n0 + image) * input_image + c0 * in_source.channel_stride, in_source,
                      std::min(kInterleavedChannels, problem.in_channels - c0), packed_in, A{0},
                      packed_source + image * in_image + c0 * packed_in.plane());
        } else {
          const int64_t k0 = (block - in_blocks) * kInterleavedChannels;
          pack_planes(grad_output + (n0 + image) * output_image + k0 * out_source.channel_stride,
                      out_source, std::min(kInterleavedChannels, problem.out_channels - k0),
                      packed_out, A{0},
                      packed_gradient + image * out_image + k0 * packed_out.plane());
        }
      }
    });
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> offsets;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = task % c_blocks * c_block;
        const int64_t k0 = task / c_blocks % k_blocks * kGradientChannels;
        const int64_t group = task / c_blocks / k_blocks;
        const int64_t c1 = std::min(group_in, c0 + c_block);
        offsets.clear();
        for (int64_t c = c0; c < c1; ++c) {
          for (const Tap& tap : taps) {
            offsets.push_back((group * group_in + c) * packed_in.plane() + tap.source);
          }
        }
        const int64_t k = group * group_out + k0;
        const int64_t channels = std::min<int64_t>(kGradientChannels, group_out - k0);
        const int64_t rows = images * problem.out_height;
        for (int64_t row = 0; row < rows; row += rows_per_sum) {
          const PackedImages<A> summed = {packed_gradient + k * packed_out.plane(),
                                          out_image,
                                          packed_out.plane(),
                                          packed_out.pitch(),
                                          packed_source,
                                          in_image,
                                          problem.stride_h * packed_in.pitch(),
                                          row,
                                          std::min(rows, row + rows_per_sum),
                                          problem.out_height,
                                          problem.out_width};
          double* const to = sums + k * sums_row + c0 * kernel;
          const auto run = [&](auto channels_at_once) {
            weight_gradient_taps<A, decltype(channels_at_once)::value>(summed, offsets, to,
                                                                       sums_row);
          };
          switch (channels) {
            case 4:
              run(Constant<4>{});
              break;
            case 3:
              run(Constant<3>{});
              break;
            case 2:
              run(Constant<2>{});
              break;
            default:
              run(Constant<1>{});
          }
        }
      }
    });
  }

  for (int64_t k = 0; k < problem.out_channels; ++k) {
    for (int64_t c = 0; c < group_in; ++c) {
      for (int64_t r = 0; r < problem.kernel_height; ++r) {
        for (int64_t s = 0; s < problem.kernel_width; ++s) {
          grad_weight[k * problem.weight_stride_k + c * problem.weight_stride_c +
                      r * problem.weight_stride_r + s * problem.weight_stride_s] =
              narrow<T>(
                  static_cast<A>(sums[k * sums_row + c * kernel + r * problem.kernel_width + s]));
        }
      }
    }
  }
}

// The sum of the output's gradient over images and pixels: short chains, and double.
template <class T>
void bias_gradient(const Conv2dProblem& problem, const ThreadPool& pool,
                   const void* grad_output_data, void* grad_bias_data) {
  using A = Accumulator<T>;
  const T* const grad_output = static_cast<const T*>(grad_output_data);
  T* const grad_bias = static_cast<T*>(grad_bias_data);
  constexpr int64_t lanes = kLanes<A>;
  const int64_t pixels = problem.out_height * problem.out_width;
  const int64_t channels = problem.out_channels;
  const bool serial =
      problem.batch * channels * pixels * element_size(problem.dtype) < kSerialBytes;
  if (problem.layout == Layout::nchw) {
    parallel_for(pool, channels, serial, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double total = 0;
        for (int64_t n = 0; n < problem.batch; ++n) {
          const T* const plane = grad_output + (n * channels + k) * pixels;
          int64_t i = 0;
          while (i + lanes <= pixels) {
            const int64_t last = std::min(pixels - lanes, i + (kSumLength - 1) * lanes);
            Vec<A> sum{};
            for (; i <= last; i += lanes) sum += load_widened(plane + i);
            total += sum_lanes<A>(sum);
          }
          for (; i < pixels; ++i) total += widen(plane[i]);
        }
        grad_bias[k] = narrow<T>(static_cast<A>(total));
      }
    });
    return;
  }
  const int64_t channel_block = 64;
  parallel_for(pool, ceil_div(channels, channel_block), serial, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t k0 = block * channel_block;
      const int64_t count = std::min(channel_block, channels - k0);
      double total[64] = {};
      for (int64_t pixel = 0; pixel < problem.batch * pixels; ++pixel) {
        const T* const from = grad_output + pixel * channels + k0;
        for (int64_t i = 0; i < count; ++i) total[i] += widen(from[i]);
      }
      for (int64_t i = 0; i < count; ++i) grad_bias[k0 + i] = narrow<T>(static_cast<A>(total[i]));
    }
  });
}
