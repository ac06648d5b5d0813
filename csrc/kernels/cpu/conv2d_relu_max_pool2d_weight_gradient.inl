// Weight and bias gradient of the fused block where 2x2 windows close in registers
// and input channels are few: the winners of a row of windows together.
//
// Of the four convolution outputs of a window at most one has a gradient. Four
// vectors hold the gradients of a row of windows, each those of the windows that
// its output won, and zero elsewhere. The input is packed as in the forward pass, so
// that the four outputs' elements for a tap are four vectors as well: four
// multiply-adds add a tap for a vector of windows, of which a quarter counts, where
// a winner alone would fill a few lanes of a vector with its patch.
//
// A slice owns some images and its own totals, in double; the number of slices is
// the problem's, so that the sums have one order whatever the threads.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/pack_planes.inl"

// Taps whose sums stay in registers.
constexpr int kWindowTaps = CNNK_VECTOR_REGISTERS >= 32 ? 9 : 4;

// Chains of products, of one output channel, that are added up before their lanes
// are summed in double.
constexpr int64_t kChainsPerSum = 64;

// Rows of windows whose products, four a vector of windows, are one chain.
CNNK_INLINE int64_t rows_per_chain(int64_t vectors) {
  return std::max<int64_t>(1, kSumLength / (4 * vectors));
}

// One (output channel, input channel) pair of one image: sums[t] += over windows.
template <class A>
struct WindowProducts {
  const A* plane;        // of the input channel, packed
  int64_t row_step;      // from a window's first convolution row to its second
  const Tap* even_taps;  // of the window's first column
  const Tap* odd_taps;   // of its second
  const A* gradients;
  const uint8_t* argmax;
  int64_t pitch;
  int64_t rows, columns;
  bool finite;  // the plane, and what follows its rows
};

template <int Taps, class A>
void add_window_products(const WindowProducts<A>& windows, int64_t first_tap, Vec<A>* sums) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t even[Taps], odd[Taps];
  for (int t = 0; t < Taps; ++t) {
    even[t] = windows.even_taps[first_tap + t].source;
    odd[t] = windows.odd_taps[first_tap + t].source;
  }
  const int64_t chain_rows = rows_per_chain(ceil_div(windows.columns, lanes));
  for (int64_t y0 = 0; y0 < windows.rows; y0 += chain_rows) {
    Vec<A> chain[Taps];
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) chain[t] = Vec<A>{};
    for (int64_t y = y0; y < std::min(windows.rows, y0 + chain_rows); ++y) {
      const A* const source = windows.plane + 2 * y * windows.row_step;
      for (int64_t x = 0; x < windows.columns; x += lanes) {
        const int64_t at = y * windows.pitch + x;
        const Vec<A> gradient = load(windows.gradients + at);
        const Vec<Mask<A>> tap = load_taps<A>(windows.argmax + at);
        Vec<A> won[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          won[p] = select<A>(tap == broadcast<Mask<A>>(p), gradient, Vec<A>{});
        }
        const int64_t count = windows.columns - x;
        const auto add = [&](auto whole) {
          // Past the row lie other elements, which times zero are nothing if finite.
          const auto add_product = [&](Vec<A>& sum, Vec<A> g, const A* p) {
            sum += g * (decltype(whole)::value ? load(p) : load_head(p, count));
          };
#pragma GCC unroll 9
          for (int t = 0; t < Taps; ++t) {
            const A* const top = source + x;
            const A* const bottom = top + windows.row_step;
            add_product(chain[t], won[0], top + even[t]);
            add_product(chain[t], won[1], top + odd[t]);
            add_product(chain[t], won[2], bottom + even[t]);
            add_product(chain[t], won[3], bottom + odd[t]);
          }
        };
        if (count >= lanes || windows.finite) {
          add(std::true_type{});
        } else {
          add(std::false_type{});
        }
      }
    }
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) sums[first_tap + t] += chain[t];
  }
}

// A row of windows, `step` elements apart, to the padded rows.
template <class T>
void copy_window_row(int64_t width, const T* gradients, const uint8_t* argmax, int64_t step,
                     Accumulator<T>* to_gradients, uint8_t* to_argmax) {
  if (step == 1) {
    widen_row(gradients, to_gradients, width);
    copy_taps(argmax, to_argmax, width);
    return;
  }
  for (int64_t x = 0; x < width; ++x) {
    to_gradients[x] = widen(gradients[x * step]);
    to_argmax[x] = argmax[x * step];
  }
}

template <class T>
void window_weight_gradient(const Conv2dReluMaxPool2dProblem& problem, const ThreadPool& pool,
                            const T* grad_output, const T* input, const uint8_t* argmax,
                            T* grad_weight, T* grad_bias) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const PackedPlanes packed = packed_input(conv, 2 * conv.stride_w);
  const std::vector<Tap> even = forward_taps(conv, packed, 0, 0);
  const std::vector<Tap> odd = forward_taps(conv, packed, 0, 0, conv.stride_w);
  const int64_t taps = static_cast<int64_t>(even.size());
  const PlaneSource source =
      plane_source(conv.layout, conv.in_channels, conv.in_height, conv.in_width);
  const PlaneSource pooled =
      plane_source(window.layout, window.channels, window.out_height, window.out_width);
  const int64_t input_image = image_stride(conv.in_channels, conv.in_height, conv.in_width);
  const int64_t output_image = image_stride(window.channels, window.out_height, window.out_width);
  const int64_t group_in = conv.in_channels / conv.groups;
  const int64_t group_out = conv.out_channels / conv.groups;
  const int64_t pitch = round_up(window.out_width, lanes);
  const int64_t window_rows = conv.out_channels * window.out_height;
  const int64_t window_elements = window.out_height * pitch;  // of a channel
  const int64_t images_per_sum = std::max<int64_t>(
      1, kChainsPerSum / ceil_div(window.out_height, rows_per_chain(pitch / lanes)));
  const int64_t weights = conv.out_channels * group_in * taps;
  const int64_t totals_count = weights + conv.out_channels;
  const int64_t slices = window_gradient_slices(problem);
  const Workspace total_workspace(slices * totals_count * static_cast<int64_t>(sizeof(double)));
  double* const totals = total_workspace.as<double>();
  const int64_t packed_count = conv.in_channels * packed.plane() + lanes;
  const int64_t sums_count = totals_count * lanes;
  const bool serial =
      conv.batch * weights * window.out_height * window.out_width < kSerialMultiplyAdds;

  parallel_for(pool, slices, serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace((sums_count + packed_count + window_rows * pitch) *
                                  static_cast<int64_t>(sizeof(A)) +
                              window_rows * pitch);
    Vec<A>* const sums = workspace.as<Vec<A>>();
    A* const planes = workspace.as<A>() + sums_count;
    A* const gradients = planes + packed_count;
    uint8_t* const winners = reinterpret_cast<uint8_t*>(gradients + window_rows * pitch);
    std::fill_n(planes, packed_count, A{0});
    std::fill_n(gradients, window_rows * pitch, A{0});
    std::fill_n(winners, window_rows * pitch, static_cast<uint8_t>(window.no_winner()));
    for (int64_t slice = begin; slice < end; ++slice) {
      double* const total = totals + slice * totals_count;
      std::fill_n(total, totals_count, 0.0);
      std::fill_n(workspace.as<A>(), sums_count, A{0});
      const auto flush = [&] {
        for (int64_t i = 0; i < totals_count; ++i) {
          total[i] += sum_lanes<A>(sums[i]);
          sums[i] = Vec<A>{};
        }
      };
      const int64_t n1 = conv.batch * (slice + 1) / slices;
      for (int64_t n = conv.batch * slice / slices; n < n1; ++n) {
        for (int64_t c = 0; c < conv.in_channels; c += kInterleavedChannels) {
          pack_planes(input + n * input_image + c * source.channel_stride, source,
                      std::min(kInterleavedChannels, conv.in_channels - c), packed, A{0},
                      planes + c * packed.plane());
        }
        const bool finite = all_finite(planes, packed_count);
        for (int64_t row = 0; row < window_rows; ++row) {
          const int64_t k = row / window.out_height, y = row % window.out_height;
          const int64_t from = n * output_image + k * pooled.channel_stride + y * pooled.row_stride;
          copy_window_row(window.out_width, grad_output + from, argmax + from, pooled.column_stride,
                          gradients + row * pitch, winners + row * pitch);
        }
        for (int64_t k = 0; k < conv.out_channels; ++k) {
          WindowProducts<A> products = {nullptr,
                                        conv.stride_h * packed.pitch(),
                                        even.data(),
                                        odd.data(),
                                        gradients + k * window.out_height * pitch,
                                        winners + k * window.out_height * pitch,
                                        pitch,
                                        window.out_height,
                                        window.out_width,
                                        finite};
          for (int64_t c = 0; c < group_in; ++c) {
            products.plane = planes + (k / group_out * group_in + c) * packed.plane();
            Vec<A>* const sum = sums + (k * group_in + c) * taps;
            int64_t t = 0;
            const auto add = [&](auto count) {
              constexpr int kTaps = decltype(count)::value;
              for (; t + kTaps <= taps; t += kTaps) add_window_products<kTaps>(products, t, sum);
            };
            add(Constant<kWindowTaps>{});
            add(Constant<4>{});
            add(Constant<2>{});
            add(Constant<1>{});
          }
          const Vec<Mask<A>> none = broadcast<Mask<A>>(static_cast<Mask<A>>(window.no_winner()));
          Vec<Mask<A>> foreign{};
          for (int64_t i0 = 0; i0 < window_elements; i0 += kSumLength * lanes) {
            Vec<A> chain{};
            for (int64_t i = i0; i < std::min(window_elements, i0 + kSumLength * lanes);
                 i += lanes) {
              const Vec<Mask<A>> tap = load_taps<A>(products.argmax + i);
              foreign |= tap > none;
              chain += select<A>(tap != none, load(products.gradients + i), Vec<A>{});
            }
            sums[weights + k] += chain;
          }
          if (any(foreign)) {
            WinnerPositions(window).check(0, window.out_height, [&](int64_t y, int64_t x) {
              return products.argmax[y * pitch + x];
            });
          }
        }
        if ((n1 - n) % images_per_sum == 0) flush();
      }
      flush();
    }
  });

  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t i = 0; i < totals_count; ++i) totals[i] += totals[slice * totals_count + i];
  }
  for (int64_t i = 0; grad_weight != nullptr && i < weights; ++i) {
    const int64_t t = i % taps, c = i / taps % group_in, k = i / taps / group_in;
    grad_weight[k * conv.weight_stride_k + c * conv.weight_stride_c +
                t / conv.kernel_width * conv.weight_stride_r +
                t % conv.kernel_width * conv.weight_stride_s] =
        narrow<T>(static_cast<A>(totals[i]));
  }
  for (int64_t k = 0; grad_bias != nullptr && k < conv.out_channels; ++k) {
    grad_bias[k] = narrow<T>(static_cast<A>(totals[weights + k]));
  }
}

inline void window_gradient(const Conv2dReluMaxPool2dProblem& problem, const ThreadPool& pool,
                            const void* grad_output, const void* input, const void* argmax,
                            void* grad_weight, void* grad_bias) {
  with_dtype(problem.conv.dtype, [&](auto element) {
    using T = decltype(element);
    window_weight_gradient(problem, pool, static_cast<const T*>(grad_output),
                           static_cast<const T*>(input), static_cast<const uint8_t*>(argmax),
                           static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
  });
}
