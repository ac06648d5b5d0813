// Backward of the fused block where 2x2 windows close in registers, kernels have three
// rows, and channels are few.
//
// The four convolution outputs of a window read four rows of neighbouring pixels: its
// neighbourhood, which fits the registers. A winner adds g * weights to the gradient of
// the neighbourhood, with the weights of its channel laid out four times over, once for
// each of the outputs and with zeros around them, and g * the rows of its patch to a total
// of its channel and output, of which the patch is folded into the weight gradient at
// last: 30 KiB of totals for 16 channels of two vectors a row. So the image's gradient is read and
// written once a window instead of once a winner, and no winner is looked for: a window that the
// ReLU clips meets zeros.
//
// A slice owns some images and its own totals; the number of slices is the problem's.

#include "kernels/cpu/pixel_rows.inl"

constexpr int kOutputs = 4;              // of a window
constexpr int kSlots = kOutputs + 1;     // and one for windows without a winner
constexpr int kPatchRows = 3;            // of an output
constexpr int kNeighbourhoodRows = 4;    // of all four
constexpr int64_t kWindowsPerSum = 256;  // one chain of a total, if one output won them all
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
// output p at (k * kSlots + p) * kNeighbourhoodRows * Vectors vectors, and zeros for no
// winner, so that none is looked for.
template <int Vectors, class T>
void add_winners_weights(const WindowImage<T>& image, const Accumulator<T>* shifted,
                         Accumulator<T>* gradient) {
  using A = Accumulator<T>;
  constexpr int kCount = kNeighbourhoodRows * Vectors;
  for_each_window(image, [&](int64_t window, int64_t offset) {
    const uint8_t* tap = image.argmax + window;
    const T* winner = image.gradients + window;
    const A* const end = shifted + image.channels * kSlots * kCount * kLanes<A>;
    Vec<A> sum[kCount];
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) sum[i] = Vec<A>{};
    for (const A* channel = shifted; channel != end; channel += kSlots * kCount * kLanes<A>) {
      const A* const weights = channel + *tap * (kCount * kLanes<A>);
      const Vec<A> g = broadcast(widen(*winner));
#pragma GCC unroll 12
      for (int i = 0; i < kCount; ++i) sum[i] += g * load(weights + i * kLanes<A>);
      tap += image.channel_step;
      winner += image.channel_step;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      A* const to = gradient + offset + i / Vectors * image.row + i % Vectors * kLanes<A>;
      store(to, load(to) + sum[i]);
    }
  });
}

// totals[k][p] += g * rows over the windows of an image, of the neighbourhood's rows those
// that output p reads; kSlots a channel as well. biases likewise, of one element.
template <int Vectors, class T, class Flush>
void add_winners_neighbourhoods(const WindowImage<T>& image, const Accumulator<T>* source,
                                Accumulator<T>* totals, Accumulator<T>* biases, int64_t& windows,
                                Flush&& flush) {
  using A = Accumulator<T>;
  constexpr int kCount = kNeighbourhoodRows * Vectors;
  constexpr int kTotal = kPatchRows * Vectors;
  // In memory, since a patch begins at its output's row, and aligned, since that of the
  // image crosses a cache line with every vector.
  alignas(CNNK_VECTOR_BYTES) A pixels[kCount * kLanes<A>];
  for_each_window(image, [&](int64_t window, int64_t offset) {
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      store(pixels + i * kLanes<A>,
            load(source + offset + i / Vectors * image.row + i % Vectors * kLanes<A>));
    }
    const uint8_t* tap = image.argmax + window;
    const T* winner = image.gradients + window;
    A* bias = biases;
    A* const end = totals + image.channels * kSlots * kTotal * kLanes<A>;
    for (A* channel = totals; channel != end; channel += kSlots * kTotal * kLanes<A>) {
      const A gradient = widen(*winner);
      const Vec<A> g = broadcast(gradient);
      const int64_t p = *tap;
      const A* const patch = pixels + p / 2 % 2 * Vectors * kLanes<A>;
      A* const total = channel + p * kTotal * kLanes<A>;
#pragma GCC unroll 9
      for (int i = 0; i < kTotal; ++i) {
        const int64_t lane = i * kLanes<A>;
        store(total + lane, load(total + lane) + g * load(patch + lane));
      }
      bias[p] += gradient;
      tap += image.channel_step;
      winner += image.channel_step;
      bias += kSlots;
    }
    if (++windows == kWindowsPerSum) {
      flush();
      windows = 0;
    }
  });
}

// patch_row = the sum of a patch row's totals over the four outputs, of which those of the
// second column have it `column` elements further on. `totals` are the first output's.
template <int Vectors, class A>
void fold_outputs(const A* totals, int64_t column, A* patch_row) {
  constexpr int64_t output = kPatchRows * Vectors * kLanes<A>;
  for (int64_t i = 0; i < Vectors * kLanes<A>; i += kLanes<A>) {
    Vec<A> sum{};
    for (int p = 0; p < kOutputs; ++p) sum += load(totals + p * output + p % 2 * column + i);
    store(patch_row + i, sum);
  }
}

// Throws for an argmax that no window has.
template <class T>
void check_windows(const MaxPool2dProblem& window, const WindowImage<T>& image) {
  const int64_t count = image.channels * image.height * image.width;
  typedef uint8_t Taps __attribute__((vector_size(CNNK_VECTOR_BYTES)));
  Taps largest{};
  int64_t i = 0;
  for (; i + CNNK_VECTOR_BYTES <= count; i += CNNK_VECTOR_BYTES) {
    Taps taps;
    __builtin_memcpy(&taps, image.argmax + i, sizeof taps);
    largest = taps > largest ? taps : largest;
  }
  uint8_t last = 0;
  for (int lane = 0; lane < CNNK_VECTOR_BYTES; ++lane) last = std::max(last, largest[lane]);
  for (; i < count; ++i) last = std::max(last, image.argmax[i]);
  if (last <= kOutputs) return;
  const WinnerPositions positions(window);
  for (int64_t k = 0; k < image.channels; ++k) {
    positions.check(0, image.height, [&](int64_t y, int64_t x) {
      return image.argmax[k * image.channel_step + (y * image.width + x) * image.window_step];
    });
  }
}

template <class T, int Vectors>
void neighbourhood_backward_of(const Conv2dReluMaxPool2dProblem& problem, const ThreadPool& pool,
                               const T* grad_output, const T* input, const T* weight,
                               const uint8_t* argmax, T* grad_input, T* grad_weight, T* grad_bias) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr int64_t size = kNeighbourhoodRows * Vectors * lanes;
  constexpr int64_t patch = kPatchRows * Vectors * lanes;
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const PixelRows pixels = pixel_rows(conv);
  const int64_t channels = conv.in_channels;
  const int64_t image_count = round_up(pixels.group(), lanes) + (Vectors + 1) * lanes;
  const int64_t input_image = image_stride(channels, conv.in_height, conv.in_width);
  const int64_t outputs = window.out_height * window.out_width;
  const bool nchw = conv.layout == Layout::nchw;
  const int64_t shifted_count = conv.out_channels * kSlots * size;
  const int64_t slots = conv.out_channels * kSlots;
  const int64_t totals_count = round_up(slots * (patch + 1), lanes);
  const int64_t run = conv.kernel_width * channels;  // of a patch row
  const int64_t channel_weights = conv.kernel_height * run;
  const bool covers = pixels.rows >= conv.in_height + conv.pad_top &&
                      pixels.columns >= conv.in_width + conv.pad_left;
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
  if (grad_input != nullptr) {
    std::fill_n(shifted, shifted_count, A{0});
    for (int64_t k = 0; k < conv.out_channels; ++k) {
      for (int p = 0; p < kOutputs; ++p) {
        for_each_weight(k, p, [&](int64_t at, int64_t from) {
          shifted[(k * kSlots + p) * size + at] = widen(weight[from]);
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
    std::fill_n(sums, 2 * totals_count, A{0});
    for (int64_t slice = begin; slice < end; ++slice) {
      double* const total = slice_workspace.as<double>() + slice * slice_count;
      std::fill_n(total, slice_count, 0.0);
      int64_t windows = 0, flushed = 0;
      const auto empty = [&](A* from) {
        double* next = total;
        for (int64_t k = 0; k < conv.out_channels; ++k) {
          for (int64_t r = 0; r < kPatchRows; ++r) {
            A patch_row[Vectors * lanes];
            fold_outputs<Vectors>(from + k * kSlots * patch + r * Vectors * lanes,
                                  conv.stride_w * channels, patch_row);
            for (int64_t i = 0; i < run; ++i) *next++ += patch_row[i];
          }
          const A* const biases = from + slots * patch + k * kSlots;
          *next++ += biases[0] + biases[1] + biases[2] + biases[3];
        }
        std::fill_n(from, totals_count, A{0});
      };
      const auto empty_chains = [&] {
        for (int64_t i = 0; i < totals_count; i += lanes) {
          store(sums + i, load(sums + i) + load(chains + i));
          store(chains + i, Vec<A>{});
        }
        if (++flushed == kSumsPerTotal) {
          empty(sums);
          flushed = 0;
        }
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
        check_windows(window, image);
        if (weights) {
          const T* const from_image = input + n * input_image;
          for_each_pixel(conv, pixels, [&](int64_t, int64_t to, int64_t from, int64_t step) {
            for (int64_t c = 0; c < channels; ++c)
              source[to + c] = widen(from_image[from + c * step]);
          });
          add_winners_neighbourhoods<Vectors>(image, source, chains, chains + slots * patch,
                                              windows, empty_chains);
        }
        if (grad_input == nullptr) continue;
        std::fill_n(gradient, image_count, A{0});
        if (all_finite(image.gradients, conv.out_channels * outputs)) {
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
        if (!covers) std::fill_n(to_image, input_image, T{});
        for_each_pixel(conv, pixels, [&](int64_t, int64_t from, int64_t to, int64_t step) {
          for (int64_t c = 0; c < channels; ++c)
            to_image[to + c * step] = narrow<T>(gradient[from + c]);
        });
      }
      if (!weights) continue;
      if (flushed > 0) empty(sums);
      empty(chains);
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
