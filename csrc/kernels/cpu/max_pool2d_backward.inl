// Backward of max pooling by gathering: an input element adds up the gradients
// of the windows that it won, so that each element is written once, nothing is
// set to zero before, and no two windows add to one place.
//
// A window's gradient counts where its argmax names the tap by which the window
// covers the element: a comparison and a masked addition for a vector of
// elements. Windows are added in their order, as torch does. NCHW: vectors along
// a row, one for each residue of the column modulo the stride; the rows of
// gradients and of argmaxes that a band of input rows needs are copied into the
// first-level cache, with an argmax beside them that no tap equals. NHWC:
// vectors along the channels, read where they lie.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"

// A window over a position: where its gradient lies, and the tap by which it covers.
struct Cover {
  int64_t offset, tap;
};

struct Covers {
  const Cover *begin, *end;
};

// The windows over each position of one axis, in their order. Offsets count
// `window_step` a window and taps `tap_step` a tap.
class AxisCovers {
 public:
  AxisCovers(int64_t extent, int64_t windows, int64_t kernel, int64_t stride, int64_t dilation,
             int64_t padding, int64_t window_step, int64_t tap_step) {
    begin_.reserve(static_cast<size_t>(extent) + 1);
    covers_.reserve(static_cast<size_t>(windows * kernel));
    for (int64_t at = 0; at < extent; ++at) {
      begin_.push_back(covers_.size());
      for (int64_t tap = kernel - 1; tap >= 0; --tap) {  // the last tap is the first window's
        const int64_t start = at + padding - tap * dilation;
        if (start >= 0 && start % stride == 0 && start / stride < windows) {
          covers_.push_back({start / stride * window_step, tap * tap_step});
        }
      }
    }
    begin_.push_back(covers_.size());
  }

  Covers operator[](int64_t at) const {
    const size_t i = static_cast<size_t>(at);
    return {covers_.data() + begin_[i], covers_.data() + begin_[i + 1]};
  }

 private:
  std::vector<Cover> covers_;
  std::vector<size_t> begin_;
};

inline AxisCovers row_covers(const MaxPool2dProblem& problem, int64_t window_row) {
  return {problem.in_height, problem.out_height,  problem.kernel_height,
          problem.stride_h,  problem.dilation_h,  problem.pad_top,
          window_row,        problem.kernel_width};
}

// Refuses an argmax that its window does not have: a gather would lose its
// gradient in silence. Columns [begin, end) of windows lie inside of the image.
template <class Tap>
struct ArgmaxCheck {
  const MaxPool2dProblem& problem;
  WinnerPositions positions;
  int64_t begin, end;

  explicit ArgmaxCheck(const MaxPool2dProblem& problem) : problem(problem), positions(problem) {
    const int64_t reach = (problem.kernel_width - 1) * problem.dilation_w;
    const int64_t room = problem.in_width - 1 + problem.pad_left - reach;
    end = room < 0 ? 0 : std::min(problem.out_width, room / problem.stride_w + 1);
    begin = std::min(end, ceil_div(problem.pad_left, problem.stride_w));
  }

  void each(int64_t y, const Tap* row, int64_t pixel, int64_t from, int64_t to) const {
    for (int64_t i = from * pixel; i < to * pixel; ++i) {
      const int64_t tap = static_cast<int64_t>(row[i]);
      if (tap != problem.no_winner()) positions(y, i / pixel, tap);
    }
  }

  // Whether every tap is one of [first, last] or no winner, a vector of `Bytes` at
  // a time; the last one is moved back to end with the taps.
  template <int Bytes>
  static bool within(const Tap* taps, int64_t count, Tap first, Tap last, Tap none) {
    typedef Tap Taps __attribute__((vector_size(Bytes)));
    constexpr int64_t lanes = Bytes / static_cast<int64_t>(sizeof(Tap));
    Tap padded[lanes];
    if (count < lanes) {
      std::fill(std::copy_n(taps, count, padded), padded + lanes, none);
      taps = padded;
      count = lanes;
    }
    auto foreign = Taps{} != Taps{};
    for (int64_t i = 0; i < count; i += lanes) {
      Taps tap;
      __builtin_memcpy(&tap, taps + std::min(i, count - lanes), sizeof tap);
      foreign |= ((tap < first) | (tap > last)) & (tap != none);
    }
    return !any(foreign);
  }

  // The rows [y0, y1) of windows, `pixel` consecutive elements each.
  void operator()(int64_t y0, int64_t y1, const Tap* taps, int64_t pixel) const {
    const int64_t row = problem.out_width * pixel;
    for (int64_t y = y0, next; y < y1; y = next) {
      const WindowRange rows = window_rows(problem, y);
      for (next = y + 1; next < y1 && window_rows(problem, next) == rows;) ++next;
      const Tap* const from = taps + (y - y0) * row;
      const int64_t count = (next - y) * row;
      const auto scan =
          count * sizeof(Tap) < CNNK_VECTOR_BYTES ? &within<16> : &within<CNNK_VECTOR_BYTES>;
      const bool plain = scan(from, count, static_cast<Tap>(rows.first * problem.kernel_width),
                              static_cast<Tap>(rows.last * problem.kernel_width - 1),
                              static_cast<Tap>(problem.no_winner()));
      for (int64_t at = y; at < next; ++at) {
        each(at, from + (at - y) * row, pixel, 0, plain ? begin : problem.out_width);
        each(at, from + (at - y) * row, pixel, end, problem.out_width);
      }
    }
  }
};

template <class A>
CNNK_INLINE void add_won(Vec<A>& sum, Vec<Mask<A>> taps, Mask<A> tap, Vec<A> gradients) {
  sum += select<A>(taps == broadcast<Mask<A>>(tap), gradients, Vec<A>{});
}

// NCHW.

// The rows of gradients and argmaxes of a band's windows, with a border that no
// element has won. Input column stride_w * i + phase is covered by the windows
// i + offset of the phase's taps.
template <class A, class Tap>
struct WindowBand {
  std::vector<Cover> columns;       // of phase 0, of phase 1, ...
  std::vector<int64_t> phase_ends;  // where each phase ends in `columns`
  int64_t left = 0;                 // columns of the border
  int64_t width, pitch;             // of a row of windows, without and with the border
  int64_t rows;                     // at most
  int64_t reach;                    // input rows from a window's first to its last

  WindowBand(const MaxPool2dProblem& problem, int64_t input_rows)
      : width(problem.out_width), reach((problem.kernel_height - 1) * problem.dilation_h) {
    int64_t right = 0;
    for (int64_t phase = 0; phase < problem.stride_w; ++phase) {
      for (int64_t tap = problem.kernel_width - 1; tap >= 0; --tap) {
        const int64_t start = phase + problem.pad_left - tap * problem.dilation_w;
        if (start % problem.stride_w != 0) continue;
        const int64_t offset = start / problem.stride_w;
        columns.push_back({offset, tap});
        left = std::max(left, -offset);
        right = std::max(right, offset);
      }
      phase_ends.push_back(static_cast<int64_t>(columns.size()));
    }
    const int64_t loaded = round_up(ceil_div(problem.in_width, problem.stride_w), kLanes<A>);
    pitch = round_up(left + std::max(width, loaded + right), kLanes<A>);
    rows = std::min(problem.out_height, (input_rows + reach) / problem.stride_h + 1);
  }

  Covers phase(int64_t index) const {
    return {columns.data() + (index == 0 ? 0 : phase_ends[index - 1]),
            columns.data() + phase_ends[index]};
  }
  int64_t gradient_bytes() const { return rows * pitch * static_cast<int64_t>(sizeof(A)); }
  int64_t argmax_bytes() const { return rows * pitch * static_cast<int64_t>(sizeof(Tap)); }

  template <class T>
  void copy(const T* gradients, const Tap* argmax, int64_t count, A* to_gradients,
            Tap* to_argmax) const {
    for (int64_t y = 0; y < count; ++y) {
      widen_row(gradients + y * width, to_gradients + y * pitch + left, width);
      copy_taps(argmax + y * width, to_argmax + y * pitch + left, width);
    }
  }
};

// The windows' gradients and argmaxes, as a band or a tensor has them.
template <class T, class Tap>
struct Windows {
  const T* gradients;
  const Tap* argmax;
};

template <class A, class Tap>
CNNK_INLINE Vec<A> gather_phase(const Windows<A, Tap>& windows, const Covers& rows,
                                const Covers& columns, int64_t i) {
  Vec<A> sum{};
  for (const Cover* row = rows.begin; row != rows.end; ++row) {
    for (const Cover* column = columns.begin; column != columns.end; ++column) {
      const int64_t at = row->offset + column->offset + i;
      add_won<A>(sum, load_taps<A>(windows.argmax + at),
                 static_cast<Mask<A>>(row->tap + column->tap), load(windows.gradients + at));
    }
  }
  return sum;
}

template <class T, class Tap>
CNNK_INLINE void gather_row(const WindowBand<Accumulator<T>, Tap>& band,
                            const Windows<Accumulator<T>, Tap>& windows, const Covers& rows,
                            int64_t width, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t stride = static_cast<int64_t>(band.phase_ends.size());
  const auto put = [&](int64_t x, Vec<A> v) {
    if (x + lanes <= width) {
      store_narrowed(to + x, v);
    } else if (x < width) {
      store_head(to + x, v, width - x);
    }
  };
  if (stride == 1) {
    for (int64_t x = 0; x < width; x += lanes) {
      put(x, gather_phase(windows, rows, band.phase(0), x));
    }
  } else if (stride == 2) {
    const Covers even = band.phase(0), odd = band.phase(1);
    for (int64_t x = 0; x < width; x += 2 * lanes) {
      const LowHigh<A> columns = interleaved<A>(gather_phase(windows, rows, even, x / 2),
                                                gather_phase(windows, rows, odd, x / 2));
      put(x, columns.low);
      put(x + lanes, columns.high);
    }
  } else {
    for (int64_t phase = 0; phase < stride; ++phase) {
      for (int64_t x = phase, i = 0; x < width; x += lanes * stride, i += lanes) {
        store_first(to + x, gather_phase(windows, rows, band.phase(phase), i),
                    std::min(lanes, ceil_div(width - x, stride)), stride);
      }
    }
  }
}

template <class T, class Tap>
void gather_nchw(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const ThreadPool& pool,
                 const T* grad_output, const Tap* argmax, T* grad_input) {
  using A = Accumulator<T>;
  constexpr Tap nobody = static_cast<Tap>(-1);
  const ArgmaxCheck<Tap> check(problem);
  const WindowBand<A, Tap> band(problem, plan.gradient_rows_per_band);
  const AxisCovers covers = row_covers(problem, band.pitch);
  const int64_t bands = ceil_div(problem.in_height, plan.gradient_rows_per_band);
  parallel_for(pool, problem.batch * problem.channels * bands, plan.threads == 1,
               [&](int64_t begin, int64_t end) {
                 const Workspace workspace(band.gradient_bytes() + band.argmax_bytes());
                 A* const gradients = workspace.as<A>();
                 Tap* const winners =
                     reinterpret_cast<Tap*>(workspace.as<char>() + band.gradient_bytes());
                 std::fill_n(winners, band.rows * band.pitch, nobody);
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t plane = task / bands;
                   const int64_t y0 = task % bands * plan.gradient_rows_per_band;
                   const int64_t y1 = std::min(problem.in_height, y0 + plan.gradient_rows_per_band);
                   const int64_t above = y0 + problem.pad_top - band.reach;
                   const int64_t first = above > 0 ? ceil_div(above, problem.stride_h) : 0;
                   const int64_t last = std::min(problem.out_height,
                                                 (y1 - 1 + problem.pad_top) / problem.stride_h + 1);
                   if (first < last) {
                     const int64_t at = (plane * problem.out_height + first) * problem.out_width;
                     check(first, last, argmax + at, 1);
                     band.copy(grad_output + at, argmax + at, last - first, gradients, winners);
                   }
                   // As if the band held all rows of windows.
                   const int64_t origin = band.left - first * band.pitch;
                   const Windows<A, Tap> windows = {gradients + origin, winners + origin};
                   for (int64_t y = y0; y < y1; ++y) {
                     gather_row(band, windows, covers[y], problem.in_width,
                                grad_input + (plane * problem.in_height + y) * problem.in_width);
                   }
                 }
               });
}

// NHWC.

// `Vectors` vectors of channels of one pixel.
template <int Vectors, class T, class Tap>
CNNK_INLINE void gather_channels(const Windows<T, Tap>& windows, const Covers& rows,
                                 const Covers& columns, int64_t c, T* to) {
  using A = Accumulator<T>;
  Vec<A> sums[Vectors] = {};
  for (const Cover* row = rows.begin; row != rows.end; ++row) {
    for (const Cover* column = columns.begin; column != columns.end; ++column) {
      const Mask<A> tap = static_cast<Mask<A>>(row->tap + column->tap);
      const int64_t start = row->offset + column->offset + c;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = start + v * kLanes<A>;
        add_won<A>(sums[v], load_taps<A>(windows.argmax + at), tap,
                   load_widened(windows.gradients + at));
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store_narrowed(to + c + v * kLanes<A>, sums[v]);
}

// The last channels of a pixel, fewer than a vector.
template <class T, class Tap>
CNNK_INLINE void gather_last_channels(const Windows<T, Tap>& windows, const Covers& rows,
                                      const Covers& columns, int64_t c, int64_t count, T* to) {
  using A = Accumulator<T>;
  Vec<A> sum{};
  for (const Cover* row = rows.begin; row != rows.end; ++row) {
    for (const Cover* column = columns.begin; column != columns.end; ++column) {
      const int64_t at = row->offset + column->offset + c;
      add_won<A>(sum, load_taps_head<A>(windows.argmax + at, count),
                 static_cast<Mask<A>>(row->tap + column->tap),
                 load_head(windows.gradients + at, count));
    }
  }
  store_head(to + c, sum, count);
}

template <class T, class Tap>
void gather_nhwc(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const ThreadPool& pool,
                 const T* grad_output, const Tap* argmax, T* grad_input) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  // As many channels at a time as four vectors hold: the rows of windows that
  // cover a row of pixels then stay in the first-level cache.
  constexpr int kVectors = 4;
  const int64_t channels = problem.channels;
  const int64_t out_row = problem.out_width * channels;
  const AxisCovers row_windows = row_covers(problem, out_row);
  const AxisCovers column_windows(problem.in_width, problem.out_width, problem.kernel_width,
                                  problem.stride_w, problem.dilation_w, problem.pad_left, channels,
                                  1);
  const ArgmaxCheck<Tap> check(problem);
  // A row of pixels checks the windows that begin in it.
  const auto check_rows = [&](int64_t y, const Tap* image) {
    const int64_t first = y == 0 ? 0 : ceil_div(y + problem.pad_top, problem.stride_h);
    const int64_t last = std::min(problem.out_height, (y + problem.pad_top) / problem.stride_h + 1);
    if (first < last) check(first, last, image + first * out_row, channels);
  };
  parallel_for(pool, problem.batch * problem.in_height, plan.threads == 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t y = task % problem.in_height;
                   const int64_t image = task / problem.in_height * problem.out_height * out_row;
                   const Windows<T, Tap> windows = {grad_output + image, argmax + image};
                   const Covers rows = row_windows[y];
                   check_rows(y, windows.argmax);
                   for (int64_t c0 = 0; c0 < channels; c0 += kVectors * lanes) {
                     const int64_t c1 = std::min(channels, c0 + kVectors * lanes);
                     for (int64_t x = 0; x < problem.in_width; ++x) {
                       const Covers columns = column_windows[x];
                       T* const to = grad_input + (task * problem.in_width + x) * channels;
                       if (c1 - c0 == kVectors * lanes) {
                         gather_channels<kVectors>(windows, rows, columns, c0, to);
                         continue;
                       }
                       int64_t c = c0;
                       for (; c + lanes <= c1; c += lanes) {
                         gather_channels<1>(windows, rows, columns, c, to);
                       }
                       if (c < c1) gather_last_channels(windows, rows, columns, c, c1 - c, to);
                     }
                   }
                 }
               });
}

inline void gather_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                            const ThreadPool& pool, const void* grad_output, const void* argmax,
                            void* grad_input) {
  with_dtype(problem.dtype, [&](auto element) {
    with_tap(problem, [&](auto tap) {
      using T = decltype(element);
      using Tap = decltype(tap);
      const auto run = problem.layout == Layout::nchw ? &gather_nchw<T, Tap> : &gather_nhwc<T, Tap>;
      run(problem, plan, pool, static_cast<const T*>(grad_output), static_cast<const Tap*>(argmax),
          static_cast<T*>(grad_input));
    });
  });
}
