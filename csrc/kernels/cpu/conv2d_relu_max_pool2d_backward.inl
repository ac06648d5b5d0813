// Backward of the fused block through the winners only.
//
// A convolution output has a gradient only if it won its window and passed the
// ReLU: at most one in four with 2x2 windows. Each winner adds g * patch to its
// channel's weight gradient and g * weights to the input gradient. The image is
// kept as rows of pixels of channels, so that a kernel row of a patch is one
// contiguous run of kernel_width * channels elements, however few the channels
// are; weights and their gradients are kept as the same runs, padded to whole
// vectors.
//
// A task owns a fixed range of images and its own partial weight gradient, to
// which it adds image by image in double; partials are added up in their order, so
// that a thread count has one result.

#include "kernels/cpu/pixel_rows.inl"

// What the partial weight gradients of all tasks may take.
constexpr int64_t kPartialBytes = int64_t{64} * 1024 * 1024;

// Vectors of one run that stay in registers while all winners pass.
constexpr int kRunVectors = CNNK_VECTOR_REGISTERS >= 32 ? 16 : 8;

// How a patch of one group falls into contiguous runs.
struct Runs {
  int64_t count;                 // kernel rows, or single taps if columns are dilated
  int64_t length;                // elements
  int64_t padded;                // elements, a multiple of the vector width
  std::vector<int64_t> offsets;  // from the patch's first pixel
  int64_t size() const { return count * padded; }
};

template <class A>
Runs patch_runs(const Conv2dProblem& conv, const PixelRows& pixels) {
  Runs runs;
  const bool whole_rows = conv.dilation_w == 1;
  runs.length = (whole_rows ? conv.kernel_width : 1) * pixels.channels;
  runs.padded = round_up(runs.length, kLanes<A>);
  for (int64_t r = 0; r < conv.kernel_height; ++r) {
    for (int64_t s = 0; s < (whole_rows ? 1 : conv.kernel_width); ++s) {
      runs.offsets.push_back(r * conv.dilation_h * pixels.row() +
                             s * conv.dilation_w * pixels.channels);
    }
  }
  runs.count = static_cast<int64_t>(runs.offsets.size());
  return runs;
}

// Where weight (c, r, s) of one output channel lies in its runs.
CNNK_INLINE int64_t run_position(const Conv2dProblem& conv, const Runs& runs, int64_t channels,
                                 int64_t c, int64_t r, int64_t s) {
  if (conv.dilation_w == 1) return r * runs.padded + s * channels + c;
  return (r * conv.kernel_width + s) * runs.padded + c;
}

template <class A>
struct WinnerGradient {
  int64_t offset;  // of the patch's first pixel in its group's rows
  A gradient;
};

// From pooling windows to patches.
struct PatchOffsets {
  WinnerPositions positions;
  std::vector<int64_t> taps;      // of the patch of each tap, from the window's first
  int64_t row_step, column_step;  // from one convolution output to the next
  int64_t passes;

  PatchOffsets(const Conv2dReluMaxPool2dProblem& problem, const PixelRows& pixels)
      : positions(problem.pool),
        row_step(problem.conv.stride_h * pixels.row()),
        column_step(problem.conv.stride_w * pixels.channels) {
    const MaxPool2dProblem& window = problem.pool;
    for (int64_t r = 0; r < window.kernel_height; ++r) {
      for (int64_t s = 0; s < window.kernel_width; ++s) {
        taps.push_back(r * window.dilation_h * row_step + s * window.dilation_w * column_step);
      }
    }
    taps.push_back(0);  // of no winner, which is looked up, but not kept
    // Neighbours in a row have overlapping patches, and a load that spans
    // several recent stores stalls until they reach the cache. So a row is
    // visited in passes of windows whose patches do not overlap.
    const Conv2dProblem& conv = problem.conv;
    const int64_t footprint = (window.kernel_width - 1) * window.dilation_w * conv.stride_w +
                              (conv.kernel_width - 1) * conv.dilation_w + 1;
    passes = ceil_div(footprint, window.stride_w * conv.stride_w);
  }
};

// The winners of one output channel of one image that pass a gradient.
template <class T, class Tap>
void collect_winners(const MaxPool2dProblem& window, const PatchOffsets& patches,
                     const T* grad_output, const Tap* argmax, int64_t pixel_step,
                     std::vector<WinnerGradient<Accumulator<T>>>& winners) {
  using A = Accumulator<T>;
  winners.resize(static_cast<size_t>(window.out_height * window.out_width));
  WinnerGradient<A>* next = winners.data();
  const size_t no_winner = static_cast<size_t>(window.no_winner());
  const int64_t reach_h = (window.kernel_height - 1) * window.dilation_h;
  const int64_t reach_w = (window.kernel_width - 1) * window.dilation_w;
  for (int64_t y = 0; y < window.out_height; ++y) {
    const int64_t start_y = y * window.stride_h - window.pad_top;
    const bool inside_h = start_y >= 0 && start_y + reach_h < window.in_height;
    for (int64_t first = 0; first < std::min(patches.passes, window.out_width); ++first) {
      for (int64_t x = first; x < window.out_width; x += patches.passes) {
        const int64_t at = (y * window.out_width + x) * pixel_step;
        const int64_t start_x = x * window.stride_w - window.pad_left;
        const size_t tap = static_cast<size_t>(argmax[at]);
        // A tap of a window that lies inside is inside; others are looked up.
        const bool inside = inside_h & (start_x >= 0) & (start_x + reach_w < window.in_width);
        if ((!inside && tap != no_winner) || tap > no_winner) {
          patches.positions(y, x, static_cast<int64_t>(argmax[at]));
        }
        const A gradient = widen(grad_output[at]);
        // Written always, kept only if it passes: a branch here would be taken
        // at random.
        *next = {start_y * patches.row_step + start_x * patches.column_step + patches.taps[tap],
                 gradient};
        next += (tap != no_winner) & !(gradient == A{0});
      }
    }
  }
  winners.resize(static_cast<size_t>(next - winners.data()));
}

// sums[i] += g * source[offset + i] over the winners, for NV vectors of a run, in
// chains of kSumLength.
template <class A, int NV>
void weight_gradient_run(const std::vector<WinnerGradient<A>>& winners, const A* source, A* sums) {
  const WinnerGradient<A>* winner = winners.data();
  const WinnerGradient<A>* const end = winner + winners.size();
  while (winner != end) {
    const WinnerGradient<A>* const last = winner + std::min<int64_t>(kSumLength, end - winner);
    Vec<A> sum[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) sum[i] = Vec<A>{};
    for (; winner != last; ++winner) {
      const Vec<A> g = broadcast(winner->gradient);
      const A* const from = source + winner->offset;
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sum[i] += g * load(from + i * kLanes<A>);
    }
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(sums + i * kLanes<A>, load(sums + i * kLanes<A>) + sum[i]);
  }
}

template <class A>
void weight_gradient_of(const std::vector<WinnerGradient<A>>& winners, const Runs& runs,
                        const A* source, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t run = 0; run < runs.count; ++run) {
    int64_t i = 0;
    const auto vectors = [&](auto count) {
      constexpr int NV = decltype(count)::value;
      weight_gradient_run<A, NV>(winners, source + runs.offsets[run] + i,
                                 sums + run * runs.padded + i);
      i += NV * lanes;
    };
    while (runs.padded - i >= kRunVectors * lanes) vectors(Constant<kRunVectors>{});
    while (runs.padded - i >= 4 * lanes) vectors(Constant<4>{});
    while (runs.padded - i >= 2 * lanes) vectors(Constant<2>{});
    while (runs.padded - i >= lanes) vectors(Constant<1>{});
  }
}

// gradient[offset + i] += g * weights[i] over the winners.
template <class A>
void input_gradient_of(const std::vector<WinnerGradient<A>>& winners, const Runs& runs,
                       const A* weights, A* gradient) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = runs.length / lanes * lanes;
  const Vec<Mask<A>> tail = first_lanes<A>(runs.length - whole);
  for (const WinnerGradient<A>& winner : winners) {
    const Vec<A> g = broadcast(winner.gradient);
    for (int64_t run = 0; run < runs.count; ++run) {
      A* const to = gradient + winner.offset + runs.offsets[run];
      const A* const from = weights + run * runs.padded;
      for (int64_t i = 0; i < whole; i += lanes) store(to + i, load(to + i) + g * load(from + i));
      if (whole < runs.length) {
        // The lanes past the run belong to other pixels, which an infinite g
        // times a padding zero would turn to NaN.
        const Vec<A> old = load(to + whole);
        store(to + whole, select<A>(tail, old + g * load(from + whole), old));
      }
    }
  }
}

template <class T, class Tap>
void backward(const Conv2dReluMaxPool2dProblem& problem, const ThreadPool& pool,
              const void* grad_output_data, const void* input_data, const void* weight_data,
              const void* argmax_data, void* grad_input_data, void* grad_weight_data,
              void* grad_bias_data) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const T* const grad_output = static_cast<const T*>(grad_output_data);
  const T* const input = static_cast<const T*>(input_data);
  const T* const weight = static_cast<const T*>(weight_data);
  const Tap* const argmax = static_cast<const Tap*>(argmax_data);
  T* const grad_input = static_cast<T*>(grad_input_data);
  T* const grad_weight = static_cast<T*>(grad_weight_data);
  T* const grad_bias = static_cast<T*>(grad_bias_data);
  const bool nchw = conv.layout == Layout::nchw;
  const int64_t group_out = conv.out_channels / conv.groups;
  const PixelRows pixels = pixel_rows(conv);
  const Runs runs = patch_runs<A>(conv, pixels);
  const int64_t image_count = conv.groups * pixels.group() + lanes;
  const int64_t input_image = image_stride(conv.in_channels, conv.in_height, conv.in_width);
  const int64_t outputs = window.out_height * window.out_width;
  const int64_t output_image = conv.out_channels * outputs;
  const int64_t pixel_step = nchw ? 1 : conv.out_channels;
  const PatchOffsets patches(problem, pixels);

  // Multiply-adds if every window passes a gradient.
  const int64_t work = conv.batch * output_image * runs.size();
  const int64_t sums_count = conv.out_channels * runs.size();
  const int64_t partial_count = sums_count + conv.out_channels;
  const int64_t partial_bytes = partial_count * static_cast<int64_t>(sizeof(double));
  const int64_t tasks = work < kSerialMultiplyAdds
                            ? 1
                            : std::clamp<int64_t>(kPartialBytes / partial_bytes, 1,
                                                  std::min<int64_t>(conv.batch, pool.threads));
  const Workspace partials(tasks * partial_bytes);
  const Workspace weight_workspace(sums_count * static_cast<int64_t>(sizeof(A)));
  A* const weight_runs = weight_workspace.as<A>();

  const auto for_each_weight = [&](const auto& visit) {
    for (int64_t k = 0; k < conv.out_channels; ++k) {
      for (int64_t c = 0; c < pixels.channels; ++c) {
        for (int64_t r = 0; r < conv.kernel_height; ++r) {
          for (int64_t s = 0; s < conv.kernel_width; ++s) {
            visit(k * conv.weight_stride_k + c * conv.weight_stride_c + r * conv.weight_stride_r +
                      s * conv.weight_stride_s,
                  k * runs.size() + run_position(conv, runs, pixels.channels, c, r, s));
          }
        }
      }
    }
  };
  if (grad_input != nullptr) {
    std::fill_n(weight_runs, sums_count, A{0});
    for_each_weight([&](int64_t at, int64_t run) { weight_runs[run] = widen(weight[at]); });
  }

  parallel_for(pool, tasks, tasks == 1, [&](int64_t begin, int64_t end) {
    const Workspace images((2 * image_count + sums_count) * static_cast<int64_t>(sizeof(A)));
    A* const sums = images.as<A>();  // of one image
    A* const source = sums + sums_count;
    A* const gradient = source + image_count;
    std::vector<WinnerGradient<A>> winners;
    if (grad_weight != nullptr) std::fill_n(source, image_count, A{0});  // the border stays zero
    for (int64_t task = begin; task < end; ++task) {
      double* const totals = partials.as<double>() + task * partial_count;
      std::fill_n(totals, partial_count, 0.0);
      for (int64_t n = conv.batch * task / tasks; n < conv.batch * (task + 1) / tasks; ++n) {
        if (grad_weight != nullptr) {
          std::fill_n(sums, sums_count, A{0});
          const T* const image = input + n * input_image;
          for_each_pixel(conv, pixels, [&](int64_t group, int64_t to, int64_t from, int64_t step) {
            A* const pixel = source + group * pixels.group() + to;
            for (int64_t c = 0; c < pixels.channels; ++c) pixel[c] = widen(image[from + c * step]);
          });
        }
        if (grad_input != nullptr) std::fill_n(gradient, image_count, A{0});
        for (int64_t k = 0; k < conv.out_channels; ++k) {
          const int64_t at = n * output_image + (nchw ? k * outputs : k);
          collect_winners(window, patches, grad_output + at, argmax + at, pixel_step, winners);
          const int64_t group = k / group_out * pixels.group();
          if (grad_bias != nullptr) {
            double sum = 0;
            for (const WinnerGradient<A>& winner : winners) sum += winner.gradient;
            totals[sums_count + k] += sum;
          }
          if (grad_weight != nullptr) {
            weight_gradient_of(winners, runs, source + group, sums + k * runs.size());
          }
          if (grad_input != nullptr) {
            input_gradient_of(winners, runs, weight_runs + k * runs.size(), gradient + group);
          }
        }
        if (grad_weight != nullptr) {
          for (int64_t i = 0; i < sums_count; ++i) totals[i] += sums[i];
        }
        if (grad_input != nullptr) {
          T* const image = grad_input + n * input_image;
          std::fill_n(image, input_image, T{});
          for_each_pixel(conv, pixels, [&](int64_t group, int64_t from, int64_t to, int64_t step) {
            const A* const pixel = gradient + group * pixels.group() + from;
            for (int64_t c = 0; c < pixels.channels; ++c)
              image[to + c * step] = narrow<T>(pixel[c]);
          });
        }
      }
    }
  });

  double* const total = partials.as<double>();
  for (int64_t task = 1; task < tasks; ++task) {
    const double* const partial = total + task * partial_count;
    for (int64_t i = 0; i < partial_count; ++i) total[i] += partial[i];
  }
  if (grad_weight != nullptr) {
    for_each_weight(
        [&](int64_t at, int64_t run) { grad_weight[at] = narrow<T>(static_cast<A>(total[run])); });
  }
  for (int64_t k = 0; grad_bias != nullptr && k < conv.out_channels; ++k) {
    grad_bias[k] = narrow<T>(static_cast<A>(total[sums_count + k]));
  }
}
