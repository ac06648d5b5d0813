// Max pooling.
//
// NCHW: vectors along a row of a plane, which is read where it lies, and at
// stride 2 split into its even and odd columns on the way to the registers.
// With a border, a greater stride or a 16-bit type, a band of rows is packed
// first (packed_planes.h), small enough to stay in the first-level cache. NHWC:
// vectors along channels, read where they lie. Without argmax no tap is kept.

#include "kernels/cpu/max_pool2d_row.inl"
#include "kernels/cpu/pack_planes.inl"

template <class A>
void forward_nchw(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                  const ThreadPool& pool, const void* input, void* output,
                  const ArgmaxOut& argmax) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  constexpr int64_t lanes = kLanes<A>;
  const PackedPlanes whole = packed_pool_input(problem);
  const PoolTables<A> tables(problem, whole);
  const int64_t rows_per_band = plan.rows_per_band;
  const int64_t bands = ceil_div(problem.out_height, rows_per_band);
  const int64_t planes = problem.batch * problem.channels;
  const int64_t in_plane = problem.in_height * problem.in_width;
  const int64_t out_plane = problem.out_height * problem.out_width;
  const PlaneSource source = {problem.in_height, problem.in_width, in_plane, problem.in_width, 1};
  const int64_t reach = (problem.kernel_height - 1) * problem.dilation_h + 1;
  const bool deinterleaves = whole.phases < problem.stride_w;
  // What the vector at column 0 may read past the columns of a narrow output.
  const int64_t overhang = whole.phases * whole.row_length + problem.stride_w * lanes;
  const int64_t packed_elements =
      ((rows_per_band - 1) * problem.stride_h + reach) * whole.pitch() + overhang;

  parallel_for(pool, planes * bands, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace(packed_elements * static_cast<int64_t>(sizeof(A)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands;
      const int64_t y0 = task % bands * rows_per_band;
      const int64_t y1 = std::min(problem.out_height, y0 + rows_per_band);
      // A narrow row reads on into the next plane, which the last one has not.
      const bool in_place = plan.in_place && (problem.out_width >= lanes ||
                                              (plane + 1 < planes && in_plane >= overhang));
      const A* rows_source;  // of row y0's first window row, in the image or above
      int64_t pitch = problem.in_width;
      if (in_place) {
        rows_source = static_cast<const A*>(input) + plane * in_plane +
                      (y0 * problem.stride_h - problem.pad_top) * problem.in_width;
      } else {
        PackedPlanes packed = whole;
        packed.top = problem.pad_top - y0 * problem.stride_h;
        packed.rows = (y1 - y0 - 1) * problem.stride_h + reach;
        pitch = packed.pitch();
        pack_planes_as<A>(problem.dtype, input, plane * in_plane, source, 1, packed, lowest,
                          workspace.as<A>());
        rows_source = workspace.as<A>();
      }
      for (int64_t y = y0; y < y1; ++y) {
        const WindowRows rows = window_rows(problem, y);
        const PoolRow<A> row = {rows_source + (y - y0) * problem.stride_h * pitch,
                                tables.row_taps.data(),
                                problem.dilation_h * pitch,
                                problem.kernel_height,
                                problem.kernel_width,
                                rows.first,
                                rows.last,
                                tables.first_column.data(),
                                problem.out_width,
                                deinterleaves};
        pool_row<A>(row, problem.dtype, output, argmax, plane * out_plane + y * problem.out_width,
                    1);
      }
    }
  });
}

// NHWC.

// An element of a window: where its channels lie, from those of the window's
// first, and its tap.
template <class A>
struct WindowElement {
  int64_t offset;
  Mask<A> tap;
};

template <class A>
CNNK_INLINE Winner<A> no_winner_yet(const WindowElement<A>& first) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  return {broadcast<A>(lowest), broadcast<Mask<A>>(first.tap)};
}

// `Vectors` vectors of channels of one output pixel.
template <bool WithTap, int Vectors, class T>
CNNK_INLINE void pool_channels(const WindowElement<Accumulator<T>>* elements, int64_t count,
                               const T* window, T* output, const ArgmaxOut& argmax, int64_t at) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  Winner<A> winners[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) winners[v] = no_winner_yet<A>(elements[0]);
  for (int64_t k = 0; k < count; ++k) {
    const T* const source = window + elements[k].offset;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      challenge<A, WithTap>(winners[v], load_widened(source + v * lanes), elements[k].tap);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    store_narrowed(output + at + v * lanes, winners[v].value);
    if constexpr (WithTap) store_taps<A>(argmax, at + v * lanes, winners[v], lanes, 1);
  }
}

// The last channels of a pixel, fewer than a vector.
template <bool WithTap, class T>
CNNK_INLINE void pool_last_channels(const WindowElement<Accumulator<T>>* elements, int64_t count,
                                    const T* window, T* output, const ArgmaxOut& argmax, int64_t at,
                                    int64_t channels) {
  using A = Accumulator<T>;
  Winner<A> winner = no_winner_yet<A>(elements[0]);
  for (int64_t k = 0; k < count; ++k) {
    challenge<A, WithTap>(winner, load_head(window + elements[k].offset, channels),
                          elements[k].tap);
  }
  store_head(output + at, winner.value, channels);
  if constexpr (WithTap) store_taps<A>(argmax, at, winner, channels, 1);
}

template <bool WithTap, class T>
void pool_pixel(const WindowElement<Accumulator<T>>* elements, int64_t count, const T* window,
                T* output, const ArgmaxOut& argmax, int64_t at, int64_t channels) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  constexpr int kVectors = CNNK_VECTOR_REGISTERS >= 32 ? 4 : 2;
  int64_t c = 0;
  for (; c + kVectors * lanes <= channels; c += kVectors * lanes) {
    pool_channels<WithTap, kVectors>(elements, count, window + c, output, argmax, at + c);
  }
  for (; c + lanes <= channels; c += lanes) {
    pool_channels<WithTap, 1>(elements, count, window + c, output, argmax, at + c);
  }
  if (c < channels) {
    pool_last_channels<WithTap>(elements, count, window + c, output, argmax, at + c, channels - c);
  }
}

// The elements of a window that lie inside of the image.
template <class A>
class WindowElements {
 public:
  explicit WindowElements(const MaxPool2dProblem& problem)
      : problem_(problem), elements_(static_cast<size_t>(problem.window())) {}

  // Returns their number; the same rows and columns again cost nothing.
  int64_t count(const WindowRows& rows, int64_t first, int64_t last) {
    if (rows.first == rows_.first && rows.last == rows_.last && first == first_ && last == last_) {
      return count_;
    }
    rows_ = rows;
    first_ = first;
    last_ = last;
    count_ = 0;
    // What wins where no element is inside.
    elements_[0].tap = static_cast<Mask<A>>(rows.first * problem_.kernel_width + first);
    for (int64_t r = rows.first; r < rows.last; ++r) {
      for (int64_t s = first; s < last; ++s) {
        elements_[count_++] = {
            (r * problem_.dilation_h * problem_.in_width + s * problem_.dilation_w) *
                problem_.channels,
            static_cast<Mask<A>>(r * problem_.kernel_width + s)};
      }
    }
    return count_;
  }
  const WindowElement<A>* data() const { return elements_.data(); }

 private:
  const MaxPool2dProblem& problem_;
  std::vector<WindowElement<A>> elements_;
  WindowRows rows_ = {-1, -1};
  int64_t first_ = -1, last_ = -1;
  int64_t count_ = 0;
};

template <bool WithTap, class T>
void forward_nhwc(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                  const ThreadPool& pool, const T* input, T* output, const ArgmaxOut& argmax) {
  const int64_t channels = problem.channels;
  const int64_t in_image = problem.in_height * problem.in_width * channels;
  parallel_for(
      pool, problem.batch * problem.out_height, plan.threads == 1, [&](int64_t begin, int64_t end) {
        WindowElements<Accumulator<T>> elements(problem);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / problem.out_height;
          const int64_t y = task % problem.out_height;
          const WindowRows rows = window_rows(problem, y);
          const T* const row =
              input + n * in_image +
              (y * problem.stride_h - problem.pad_top) * problem.in_width * channels;
          for (int64_t x = 0; x < problem.out_width; ++x) {
            const int64_t start = x * problem.stride_w - problem.pad_left;
            const int64_t first = start < 0 ? ceil_div(-start, problem.dilation_w) : 0;
            const int64_t room = problem.in_width - 1 - start;
            const int64_t last = room >= (problem.kernel_width - 1) * problem.dilation_w
                                     ? problem.kernel_width
                                 : room < 0 ? 0
                                            : room / problem.dilation_w + 1;
            const int64_t count = elements.count(rows, first, last);
            pool_pixel<WithTap>(elements.data(), count, row + start * channels, output, argmax,
                                (task * problem.out_width + x) * channels, channels);
          }
        }
      });
}

inline void forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                    const ThreadPool& pool, const void* input, void* output, void* argmax_data) {
  const ArgmaxOut argmax = {argmax_data, problem.compact_argmax(), -1};
  if (problem.layout == Layout::nchw) {
    with_accumulator(problem.dtype, [&](auto accumulator) {
      forward_nchw<decltype(accumulator)>(problem, plan, pool, input, output, argmax);
    });
  } else {
    with_dtype(problem.dtype, [&](auto element) {
      using T = decltype(element);
      const auto run = argmax_data != nullptr ? &forward_nhwc<true, T> : &forward_nhwc<false, T>;
      run(problem, plan, pool, static_cast<const T*>(input), static_cast<T*>(output), argmax);
    });
  }
}
