// Backward of the fused block where 2x2 windows close in registers, kernels have three
// rows, and channels are few but fill a vector with a row of a patch.
//
// The four convolution outputs of a window read four rows of neighbouring pixels: its
// neighbourhood, which fits the registers. A winner adds g * weights to the gradient of
// the neighbourhood, with the weights of its channel laid out four times over, once for
// each of the outputs and with zeros around them, and g * neighbourhood to a total of
// its channel and output, of which the patch is folded into the weight gradient at
// last. So the image's gradient is read and written once a window instead of once a
// winner, and no winner is looked for: a window that the ReLU clips meets zeros.
//
// A slice owns some images and its own totals; the number of slices is the problem's.

#include "kernels/cpu/pixel_rows.inl"

constexpr int kOutputs = 4;              // of a window
constexpr int kNeighbourhoodRows = 4;    // three of a kernel, and one more
constexpr int64_t kWindowsPerSum = 128;  // a quarter of them is one chain of a total
constexpr int64_t kSumsPerTotal = 32;    // which are added up before they are in double

// One image in rows of pixels, and its windows: channel k of window w has gradient
// and argmax k * channel_step + w * window_step.
template <class T>
struct WindowImage {
  const T* gradients;
  const uint8_t* argmax;
  int64_t channel_step, window_step;
  int64_t height, width, channels;
  int64_t row;                    // of pixels, in elements
  int64_t row_step, column_step;  // from one window's first pixel to the next
};

template <class T, class Visit>
CNNK_INLINE void for_each_window(const WindowImage<T>& image, Visit&& visit) {
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t x = 0; x < image.width; ++x) {
      visit((y * image.width + x) * image.window_step, y * image.row_step + x * image.column_step);
    }
  }
}

// gradient += the weights of the winners. `shifted` has the weights of channel k and
// output p at (k * kOutputs + p) * kNeighbourhoodRows * Vectors vectors, and behind the
// last channel's zeros for a window without a winner.
template <int Vectors, class T>
void add_winners_weights(const WindowImage<T>& image, const Accumulator<T>* shifted,
                         Accumulator<T>* gradient) {
  using A = Accumulator<T>;
  constexpr int kCount = kNeighbourhoodRows * Vectors;
  const A* const none = shifted + image.channels * kOutputs * kCount * kLanes<A>;
  for_each_window(image, [&](int64_t window, int64_t offset) {
    Vec<A> sum[kCount];
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) sum[i] = Vec<A>{};
    for (int64_t k = 0; k < image.channels; ++k) {
      const int64_t at = k * image.channel_step + window;
      const uint8_t tap = image.argmax[at];
      const A* const weights =
          tap < kOutputs ? shifted + (k * kOutputs + tap) * kCount * kLanes<A> : none;
      const Vec<A> g = broadcast(widen(image.gradients[at]));
#pragma GCC unroll 12
      for (int i = 0; i < kCount; ++i) sum[i] += g * load(weights + i * kLanes<A>);
    }
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      A* const to = gradient + offset + i / Vectors * image.row + i % Vectors * kLanes<A>;
      store(to, load(to) + sum[i]);
    }
  });
}

// totals[k][p] += g * neighbourhood over the windows of an image, laid out as the weights
// of add_winners_weights are, and so is where windows without a winner add to nothing;
// biases likewise, of one element.
template <int Vectors, class T, class Flush>
void add_winners_neighbourhoods(const WindowImage<T>& image, const Accumulator<T>* source,
                                Accumulator<T>* totals, Accumulator<T>* biases, int64_t& windows,
                                Flush&& flush) {
  using A = Accumulator<T>;
  constexpr int kCount = kNeighbourhoodRows * Vectors;
  for_each_window(image, [&](int64_t window, int64_t offset) {
    Vec<A> pixels[kCount];
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      pixels[i] = load(source + offset + i / Vectors * image.row + i % Vectors * kLanes<A>);
    }
    for (int64_t k = 0; k < image.channels; ++k) {
      const int64_t at = k * image.channel_step + window;
      const uint8_t tap = image.argmax[at];
      const int64_t slot = tap < kOutputs ? k * kOutputs + tap : image.channels * kOutputs;
      const A gradient = widen(image.gradients[at]);
      const Vec<A> g = broadcast(gradient);
      biases[slot] += gradient;
      A* const total = totals + slot * kCount * kLanes<A>;
#pragma GCC unroll 12
      for (int i = 0; i < kCount; ++i) {
        store(total + i * kLanes<A>, load(total + i * kLanes<A>) + g * pixels[i]);
      }
    }
    if (++windows == kWindowsPerSum) {
      flush();
      windows = 0;
    }
  });
}

// Throws for an argmax that no window has; whether all gradients are finite.
template <class T>
bool check_windows(const MaxPool2dProblem& window, const WindowImage<T>& image) {
  using A = Accumulator<T>;
  const int64_t count = image.channels * image.height * image.width;
  A marks = 0;
  uint8_t last = 0;
  for (int64_t i = 0; i < count; ++i) last = std::max(last, image.argmax[i]);
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> zeros{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) zeros += load_widened(image.gradients + i) * A{0};
  for (; i < count; ++i) marks += widen(image.gradients[i]) * A{0};
  marks += sum_lanes<A>(zeros);
  if (last > kOutputs) {
    const WinnerPositions positions(window);
    for (int64_t y = 0; y < image.height; ++y) {
      for (int64_t x = 0; x < image.width; ++x) {
        for (int64_t k = 0; k < image.channels; ++k) {
          const uint8_t tap =
              image.argmax[k * image.channel_step + (y * image.width + x) * image.window_step];
          if (tap != kOutputs) positions(y, x, tap);
        }
      }
    }
  }
  return marks == A{0};
}

template <class T, int Vectors>
void neighbourhood_backward_of(const Conv2dReluMaxPool2dProblem& problem, const ThreadPool& pool,
                               const T* grad_output, const T* input, const T* weight,
                               const uint8_t* argmax, T* grad_input, T* grad_weight, T* grad_bias) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr int64_t size = kNeighbourhoodRows * Vectors * lanes;
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const PixelRows pixels = pixel_rows(conv);
  const int64_t channels = conv.in_channels;
  const int64_t image_count = pixels.group() + (Vectors + 1) * lanes;
  const int64_t input_image = image_stride(channels, conv.in_height, conv.in_width);
  const int64_t outputs = window.out_height * window.out_width;
  const bool nchw = conv.layout == Layout::nchw;
  const int64_t shifted_count = (conv.out_channels * kOutputs + 1) * size;
  const int64_t slots = conv.out_channels * kOutputs + 1;
  const int64_t totals_count = round_up(slots * (size + 1), lanes);
  const int64_t channel_weights = conv.kernel_height * conv.kernel_width * channels;
  const bool weights = grad_weight != nullptr || grad_bias != nullptr;
  const int64_t slices = window_gradient_slices(problem);
  const int64_t slice_count = conv.out_channels * (channel_weights + 1);
  const Workspace slice_workspace(slices * slice_count * static_cast<int64_t>(sizeof(double)));
  const Workspace shifted_workspace(shifted_count * static_cast<int64_t>(sizeof(A)));
  A* const shifted = shifted_workspace.as<A>();

  // Calls visit(position in a neighbourhood, weight) for output p of channel k.
  const auto for_each_weight = [&](int64_t k, int p, const auto& visit) {
    for (int64_t r = 0; r < conv.kernel_height; ++r) {
      for (int64_t s = 0; s < conv.kernel_width; ++s) {
        for (int64_t c = 0; c < channels; ++c) {
          visit((r + p / 2) * Vectors * lanes + (s + p % 2 * conv.stride_w) * channels + c,
                k * conv.weight_stride_k + c * conv.weight_stride_c + r * conv.weight_stride_r +
                    s * conv.weight_stride_s);
        }
      }
    }
  };
  std::vector<int64_t> positions[kOutputs];  // of a channel's weights
  for (int p = 0; p < kOutputs; ++p) {
    for_each_weight(0, p, [&](int64_t at, int64_t) { positions[p].push_back(at); });
  }
  if (grad_input != nullptr) {
    std::fill_n(shifted, shifted_count, A{0});
    for (int64_t k = 0; k < conv.out_channels; ++k) {
      for (int p = 0; p < kOutputs; ++p) {
        for_each_weight(k, p, [&](int64_t at, int64_t from) {
          shifted[(k * kOutputs + p) * size + at] = widen(weight[from]);
        });
      }
    }
  }

  const bool serial = conv.batch * outputs * conv.out_channels * size < kSerialMultiplyAdds;
  parallel_for(pool, slices, serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace((2 * image_count + 2 * totals_count) *
                              static_cast<int64_t>(sizeof(A)));
    A* const source = workspace.as<A>();
    A* const gradient = source + image_count;
    A* const sums = gradient + image_count;
    A* const chains = sums + totals_count;
    std::fill_n(source, image_count, A{0});  // the border stays zero
    for (int64_t slice = begin; slice < end; ++slice) {
      double* const total = slice_workspace.as<double>() + slice * slice_count;
      std::fill_n(total, slice_count, 0.0);
      std::fill_n(sums, 2 * totals_count, A{0});
      int64_t windows = 0, flushed = 0;
      const auto empty_sums = [&] {
        for (int64_t k = 0; k < conv.out_channels; ++k) {
          double* const folded = total + k * (channel_weights + 1);
          for (int p = 0; p < kOutputs; ++p) {
            const A* const slot = sums + (k * kOutputs + p) * size;
            for (int64_t i = 0; i < channel_weights; ++i) folded[i] += slot[positions[p][i]];
            folded[channel_weights] += sums[slots * size + k * kOutputs + p];
          }
        }
        std::fill_n(sums, totals_count, A{0});
        flushed = 0;
      };
      const auto empty_chains = [&] {
        for (int64_t i = 0; i < totals_count; i += lanes) {
          store(sums + i, load(sums + i) + load(chains + i));
          store(chains + i, Vec<A>{});
        }
        if (++flushed == kSumsPerTotal) empty_sums();
      };
      const int64_t n1 = conv.batch * (slice + 1) / slices;
      for (int64_t n = conv.batch * slice / slices; n < n1; ++n) {
        const int64_t at = n * conv.out_channels * outputs;
        const WindowImage<T> image = {grad_output + at,
                                      argmax + at,
                                      nchw ? outputs : 1,
                                      nchw ? 1 : conv.out_channels,
                                      window.out_height,
                                      window.out_width,
                                      conv.out_channels,
                                      pixels.row(),
                                      2 * conv.stride_h * pixels.row(),
                                      2 * conv.stride_w * channels};
        const bool finite = check_windows(window, image);
        if (weights) {
          const T* const from_image = input + n * input_image;
          for_each_pixel(conv, pixels, [&](int64_t, int64_t to, int64_t from, int64_t step) {
            for (int64_t c = 0; c < channels; ++c)
              source[to + c] = widen(from_image[from + c * step]);
          });
          add_winners_neighbourhoods<Vectors>(image, source, chains, chains + slots * size, windows,
                                              empty_chains);
        }
        if (grad_input == nullptr) continue;
        std::fill_n(gradient, image_count, A{0});
        if (finite) {
          add_winners_weights<Vectors>(image, shifted, gradient);
        } else {
          // Times the zeros around the weights an infinite gradient would be NaN.
          for_each_window(image, [&](int64_t w, int64_t offset) {
            for (int64_t k = 0; k < conv.out_channels; ++k) {
              const int64_t i = k * image.channel_step + w;
              if (image.argmax[i] == kOutputs) continue;
              const A g = widen(image.gradients[i]);
              for_each_weight(k, image.argmax[i], [&](int64_t position, int64_t from) {
                const int64_t row = position / (Vectors * lanes);
                gradient[offset + row * image.row + position % (Vectors * lanes)] +=
                    g * widen(weight[from]);
              });
            }
          });
        }
        T* const to_image = grad_input + n * input_image;
        std::fill_n(to_image, input_image, T{});
        for_each_pixel(conv, pixels, [&](int64_t, int64_t from, int64_t to, int64_t step) {
          for (int64_t c = 0; c < channels; ++c)
            to_image[to + c * step] = narrow<T>(gradient[from + c]);
        });
      }
      empty_chains();
      empty_sums();
    }
  });
  if (!weights) return;

  double* const total = slice_workspace.as<double>();
  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t i = 0; i < slice_count; ++i) total[i] += total[slice * slice_count + i];
  }
  for (int64_t k = 0; k < conv.out_channels; ++k) {
    const double* next = total + k * (channel_weights + 1);
    if (grad_bias != nullptr) grad_bias[k] = narrow<T>(static_cast<A>(next[channel_weights]));
    if (grad_weight == nullptr) continue;
    for_each_weight(
        k, 0, [&](int64_t, int64_t to) { grad_weight[to] = narrow<T>(static_cast<A>(*next++)); });
  }
}

inline void neighbourhood_backward(const Conv2dReluMaxPool2dProblem& problem,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* input, const void* weight, const void* argmax,
                                   void* grad_input, void* grad_weight, void* grad_bias) {
  with_dtype(problem.conv.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vectors =
        ceil_div(neighbourhood_length(problem.conv), int64_t{kLanes<Accumulator<T>>});
    const auto run = vectors == 1   ? &neighbourhood_backward_of<T, 1>
                     : vectors == 2 ? &neighbourhood_backward_of<T, 2>
                                    : &neighbourhood_backward_of<T, 3>;
    run(problem, pool, static_cast<const T*>(grad_output), static_cast<const T*>(input),
        static_cast<const T*>(weight), static_cast<const uint8_t*>(argmax),
        static_cast<T*>(grad_input), static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
  });
}
