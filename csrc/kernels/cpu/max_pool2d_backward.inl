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

#include "kernels/cpu/max_pool2d_row.inl"

// The windows that cover each position of one axis, in their order.
struct Cover {
  int64_t window, tap;
};

class AxisCovers {
 public:
  AxisCovers(int64_t extent, int64_t windows, int64_t kernel, int64_t stride, int64_t dilation,
             int64_t padding) {
    begin_.reserve(static_cast<size_t>(extent) + 1);
    covers_.reserve(static_cast<size_t>(windows * kernel));
    for (int64_t at = 0; at < extent; ++at) {
      begin_.push_back(covers_.size());
      for (int64_t tap = kernel - 1; tap >= 0; --tap) {  // the last tap is the first window's
        const int64_t start = at + padding - tap * dilation;
        if (start >= 0 && start % stride == 0 && start / stride < windows) {
          covers_.push_back({start / stride, tap});
        }
      }
    }
    begin_.push_back(covers_.size());
  }

  const Cover* begin(int64_t at) const { return covers_.data() + begin_[static_cast<size_t>(at)]; }
  const Cover* end(int64_t at) const { return begin(at + 1); }

 private:
  std::vector<Cover> covers_;
  std::vector<size_t> begin_;
};

inline AxisCovers row_covers(const MaxPool2dProblem& problem) {
  return {problem.in_height, problem.out_height, problem.kernel_height,
          problem.stride_h,  problem.dilation_h, problem.pad_top};
}

// Refuses an argmax that its window does not have: a gather would lose its
// gradient in silence. Columns [begin, end) of windows lie inside of the image.
template <class Lanes>
CNNK_INLINE bool any(Lanes lanes) {
  int64_t words[sizeof lanes / sizeof(int64_t)];
  __builtin_memcpy(words, &lanes, sizeof lanes);
  int64_t all = 0;
  for (const int64_t word : words) all |= word;
  return all != 0;
}

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

  // Whether every tap is one of [first, last] or no winner.
  static bool within(const Tap* taps, int64_t count, Tap first, Tap last, Tap none) {
    constexpr int64_t lanes = kLanes<Tap>;
    auto foreign = Vec<Tap>{} != Vec<Tap>{};
    const auto compare = [&](Vec<Tap> tap) {
      foreign |= ((tap < first) | (tap > last)) & (tap != none);
    };
    if (count < lanes) {
      Tap padded[lanes];
      std::fill(std::copy_n(taps, count, padded), padded + lanes, none);
      compare(load(padded));
      return !any(foreign);
    }
    for (int64_t i = 0; i < count; i += lanes) compare(load(taps + std::min(i, count - lanes)));
    return !any(foreign);
  }

  // The rows [y0, y1) of windows, `pixel` consecutive elements each.
  void operator()(int64_t y0, int64_t y1, const Tap* taps, int64_t pixel) const {
    const int64_t row = problem.out_width * pixel;
    for (int64_t y = y0, next; y < y1; y = next) {
      const WindowRows rows = window_rows(problem, y);
      const auto alike = [&](int64_t other) {
        const WindowRows others = window_rows(problem, other);
        return others.first == rows.first && others.last == rows.last;
      };
      for (next = y + 1; next < y1 && alike(next);) ++next;
      const Tap* const from = taps + (y - y0) * row;
      const bool plain =
          within(from, (next - y) * row, static_cast<Tap>(rows.first * problem.kernel_width),
                 static_cast<Tap>(rows.last * problem.kernel_width - 1),
                 static_cast<Tap>(problem.no_winner()));
      for (int64_t at = y; at < next; ++at) {
        each(at, from + (at - y) * row, pixel, 0, plain ? begin : problem.out_width);
        each(at, from + (at - y) * row, pixel, end, problem.out_width);
      }
    }
  }
};

// A vector of taps, widened to the masks' integers. GCC converts bytes in two
// halves, and one by one where the integers are more than twice as wide.
template <class A>
CNNK_INLINE Vec<Mask<A>> load_taps(const int32_t* p) {
  typedef int32_t Taps __attribute__((vector_size(kLanes<A> * sizeof(int32_t))));
  Taps taps;
  __builtin_memcpy(&taps, p, sizeof taps);
  return __builtin_convertvector(taps, Vec<Mask<A>>);
}
template <class A>
CNNK_INLINE Vec<Mask<A>> load_taps(const uint8_t* p) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if constexpr (std::is_same_v<A, double>)
    return (Vec<Mask<A>>)_mm512_cvtepu8_epi64(_mm_loadu_si64(p));
  return (Vec<Mask<A>>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif CNNK_TIER_ID == 1
  if constexpr (std::is_same_v<A, double>)
    return (Vec<Mask<A>>)_mm256_cvtepu8_epi64(_mm_loadu_si32(p));
  return (Vec<Mask<A>>)_mm256_cvtepu8_epi32(_mm_loadu_si64(p));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<Mask<A>>);
#endif
}

// The first n < lanes taps, without reading what follows.
template <class A, class Tap>
CNNK_INLINE Vec<Mask<A>> load_taps_head(const Tap* p, int64_t n) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<Tap, uint8_t>) {
    return (Vec<Mask<A>>)_mm512_cvtepu8_epi32(
        _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p));
  }
#endif
  Tap taps[kLanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) taps[i] = p[i];
  return load_taps<A>(taps);
}

// Where a vector of elements finds the gradients and the argmaxes of one of its
// windows, and the tap by which that covers them.
template <class T, class Tap>
struct GatheredTap {
  const T* gradients;
  const Tap* argmax;
  Mask<Accumulator<T>> tap;
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
  struct ColumnTap {
    int64_t offset, tap;
  };
  std::vector<std::vector<ColumnTap>> phases;
  int64_t left = 0;      // columns of the border
  int64_t width, pitch;  // of a row of windows, without and with the border
  int64_t rows;          // at most
  int64_t reach;         // input rows from a window's first to its last

  WindowBand(const MaxPool2dProblem& problem, int64_t input_rows)
      : phases(problem.stride_w),
        width(problem.out_width),
        reach((problem.kernel_height - 1) * problem.dilation_h) {
    int64_t right = 0;
    for (int64_t phase = 0; phase < problem.stride_w; ++phase) {
      for (int64_t tap = problem.kernel_width - 1; tap >= 0; --tap) {
        const int64_t start = phase + problem.pad_left - tap * problem.dilation_w;
        if (start % problem.stride_w != 0) continue;
        const int64_t offset = start / problem.stride_w;
        phases[phase].push_back({offset, tap});
        left = std::max(left, -offset);
        right = std::max(right, offset);
      }
    }
    const int64_t columns = round_up(ceil_div(problem.in_width, problem.stride_w), kLanes<A>);
    pitch = round_up(left + std::max(width, columns + right), kLanes<A>);
    rows = std::min(problem.out_height, (input_rows + reach) / problem.stride_h + 1);
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

// The windows over a row of elements: the taps of phase 0, of phase 1, ..., each
// phase up to its end.
template <class A, class Tap>
struct RowTaps {
  std::vector<GatheredTap<A, Tap>> taps;
  std::vector<int64_t> ends;
};

template <class A, class Tap>
CNNK_INLINE Vec<A> gather_phase(const GatheredTap<A, Tap>* tap, const GatheredTap<A, Tap>* end,
                                int64_t i) {
  Vec<A> sum{};
  for (; tap != end; ++tap) {
    add_won<A>(sum, load_taps<A>(tap->argmax + i), tap->tap, load(tap->gradients + i));
  }
  return sum;
}

template <class T, class Tap>
CNNK_INLINE void gather_row(const RowTaps<Accumulator<T>, Tap>& row, int64_t width, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t stride = static_cast<int64_t>(row.ends.size());
  const GatheredTap<A, Tap>* const taps = row.taps.data();
  const auto put = [&](int64_t x, Vec<A> v) {
    if (x + lanes <= width) {
      store_narrowed(to + x, v);
    } else if (x < width) {
      store_head(to + x, v, width - x);
    }
  };
  if (stride == 1) {
    for (int64_t x = 0; x < width; x += lanes) {
      put(x, gather_phase<A>(taps, taps + row.ends[0], x));
    }
    return;
  }
  if (stride == 2) {
    const GatheredTap<A, Tap>*const odd = taps + row.ends[0], *const end = taps + row.ends[1];
    for (int64_t x = 0; x < width; x += 2 * lanes) {
      const LowHigh<A> columns =
          interleaved<A>(gather_phase<A>(taps, odd, x / 2), gather_phase<A>(odd, end, x / 2));
      put(x, columns.low);
      put(x + lanes, columns.high);
    }
    return;
  }
  int64_t begin = 0;
  for (int64_t phase = 0; phase < stride; begin = row.ends[phase++]) {
    for (int64_t x = phase, i = 0; x < width; x += lanes * stride, i += lanes) {
      store_first(to + x, gather_phase<A>(taps + begin, taps + row.ends[phase], i),
                  std::min(lanes, ceil_div(width - x, stride)), stride);
    }
  }
}

template <class T, class Tap>
void gather_nchw(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const ThreadPool& pool,
                 const T* grad_output, const Tap* argmax, T* grad_input) {
  using A = Accumulator<T>;
  constexpr Tap nobody = static_cast<Tap>(-1);
  const AxisCovers covers = row_covers(problem);
  const ArgmaxCheck<Tap> check(problem);
  const WindowBand<A, Tap> band(problem, plan.gradient_rows_per_band);
  const int64_t bands = ceil_div(problem.in_height, plan.gradient_rows_per_band);
  parallel_for(pool, problem.batch * problem.channels * bands, plan.threads == 1,
               [&](int64_t begin, int64_t end) {
                 const Workspace workspace(band.gradient_bytes() + band.argmax_bytes());
                 A* const gradients = workspace.as<A>();
                 Tap* const winners =
                     reinterpret_cast<Tap*>(workspace.as<char>() + band.gradient_bytes());
                 std::fill_n(winners, band.rows * band.pitch, nobody);
                 RowTaps<A, Tap> row_taps;
                 row_taps.taps.resize(static_cast<size_t>(problem.window()));
                 row_taps.ends.resize(static_cast<size_t>(problem.stride_w));
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
                   for (int64_t y = y0; y < y1; ++y) {
                     size_t count = 0;
                     for (size_t phase = 0; phase < band.phases.size(); ++phase) {
                       for (const Cover* row = covers.begin(y); row != covers.end(y); ++row) {
                         const int64_t start = (row->window - first) * band.pitch + band.left;
                         for (const auto& column : band.phases[phase]) {
                           row_taps.taps[count++] = {
                               gradients + start + column.offset, winners + start + column.offset,
                               static_cast<Mask<A>>(row->tap * problem.kernel_width + column.tap)};
                         }
                       }
                       row_taps.ends[phase] = static_cast<int64_t>(count);
                     }
                     gather_row(row_taps, problem.in_width,
                                grad_input + (plane * problem.in_height + y) * problem.in_width);
                   }
                 }
               });
}

// NHWC.

// `Vectors` vectors of channels of one pixel.
template <int Vectors, class T, class Tap>
CNNK_INLINE void gather_channels(const GatheredTap<T, Tap>* taps, int64_t count, int64_t c, T* to) {
  using A = Accumulator<T>;
  Vec<A> sums[Vectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = c + v * kLanes<A>;
      add_won<A>(sums[v], load_taps<A>(taps[k].argmax + at), taps[k].tap,
                 load_widened(taps[k].gradients + at));
    }
  }
  for (int v = 0; v < Vectors; ++v) store_narrowed(to + c + v * kLanes<A>, sums[v]);
}

template <class T, class Tap>
CNNK_INLINE void gather_last_channels(const GatheredTap<T, Tap>* taps, int64_t count, int64_t c,
                                      int64_t channels, T* to) {
  using A = Accumulator<T>;
  Vec<A> sum{};
  for (int64_t k = 0; k < count; ++k) {
    add_won<A>(sum, load_taps_head<A>(taps[k].argmax + c, channels), taps[k].tap,
               load_head(taps[k].gradients + c, channels));
  }
  store_head(to + c, sum, channels);
}

template <class T, class Tap>
void gather_nhwc(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const ThreadPool& pool,
                 const T* grad_output, const Tap* argmax, T* grad_input) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  // As many channels at a time as four vectors hold: the rows of windows that
  // cover a row of pixels then stay in the first-level cache.
  constexpr int kVectors = 4;
  const AxisCovers rows = row_covers(problem);
  const AxisCovers columns(problem.in_width, problem.out_width, problem.kernel_width,
                           problem.stride_w, problem.dilation_w, problem.pad_left);
  const ArgmaxCheck<Tap> check(problem);
  const int64_t channels = problem.channels;
  const int64_t out_row = problem.out_width * channels;
  // A row of pixels checks the windows that begin in it.
  const auto check_rows = [&](int64_t y, const Tap* image) {
    const int64_t first = y == 0 ? 0 : ceil_div(y + problem.pad_top, problem.stride_h);
    const int64_t last = std::min(problem.out_height - 1, (y + problem.pad_top) / problem.stride_h);
    for (int64_t window = first; window <= last; ++window) {
      check(window, window + 1, image + window * out_row, channels);
    }
  };
  parallel_for(
      pool, problem.batch * problem.in_height, plan.threads == 1, [&](int64_t begin, int64_t end) {
        std::vector<GatheredTap<T, Tap>> taps(static_cast<size_t>(problem.window()));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t y = task % problem.in_height;
          const int64_t image = task / problem.in_height * problem.out_height * out_row;
          check_rows(y, argmax + image);
          for (int64_t c0 = 0; c0 < channels; c0 += kVectors * lanes) {
            const int64_t c1 = std::min(channels, c0 + kVectors * lanes);
            for (int64_t x = 0; x < problem.in_width; ++x) {
              int64_t count = 0;
              for (const Cover* row = rows.begin(y); row != rows.end(y); ++row) {
                for (const Cover* column = columns.begin(x); column != columns.end(x); ++column) {
                  const int64_t at = image + row->window * out_row + column->window * channels;
                  taps[count++] = {
                      grad_output + at, argmax + at,
                      static_cast<Mask<A>>(row->tap * problem.kernel_width + column->tap)};
                }
              }
              T* const to = grad_input + (task * problem.in_width + x) * channels;
              int64_t c = c0;
              if (c1 - c0 == kVectors * lanes) {
                gather_channels<kVectors>(taps.data(), count, c, to);
                continue;
              }
              for (; c + lanes <= c1; c += lanes) gather_channels<1>(taps.data(), count, c, to);
              if (c < c1) gather_last_channels(taps.data(), count, c, c1 - c, to);
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
