// The backward of max pooling: every input element gathers from the windows that hold it.
//
// An element's gradient is the sum, over its windows, of the output gradients whose argmax is
// the element's tap there, in the windows' order. So each element is written once, without a
// zero before, and the sum is the same for any number of threads.
//
// NHWC: vectors along the channels, which share their windows. NCHW: vectors along the outputs.
// The elements of a row whose columns have the same remainder by the stride have the same taps,
// and their windows are neighbours. Gradients and taps of a plane are first copied with room at
// both sides, where no tap wins, so that none has to ask whether its window is there.

// A window along one axis, and the tap that an element is in it.
struct AxisWindow {
  int64_t window, tap;
};

// The windows that hold position i, in order.
inline void windows_of(int64_t i, int64_t windows, int64_t kernel, int64_t stride, int64_t pad,
                       int64_t dilation, std::vector<AxisWindow>& found) {
  found.clear();
  for (int64_t tap = kernel - 1; tap >= 0; --tap) {
    const int64_t start = i + pad - tap * dilation;
    if (start >= 0 && start % stride == 0 && start / stride < windows) {
      found.push_back({start / stride, tap});
    }
  }
}

template <class A, class Tap>
CNNK_INLINE Vec<Mask<A>> load_taps(const Tap* taps) {
  typedef Tap Narrow __attribute__((vector_size(kLanes<A> * sizeof(Tap))));
  Narrow narrow_taps;
  __builtin_memcpy(&narrow_taps, taps, sizeof narrow_taps);
  return __builtin_convertvector(narrow_taps, Vec<Mask<A>>);
}

// The windows of a row of input elements that hold them, and those of every column.
struct RowWindows {
  std::vector<AxisWindow> rows;
  std::vector<std::vector<AxisWindow>> columns;
};

template <class T, class Tap>
void backward_nhwc_row(const MaxPool2dProblem& problem, const RowWindows& windows,
                       const T* gradients, const Tap* argmax, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = problem.channels;
  const auto tap_of = [&](const AxisWindow& row, const AxisWindow& column) {
    return static_cast<Mask<A>>(row.tap * problem.kernel_width + column.tap);
  };
  const auto pixel_of = [&](const AxisWindow& row, const AxisWindow& column) {
    return (row.window * problem.out_width + column.window) * channels;
  };
  for (int64_t x = 0; x < problem.in_width; ++x, to += channels) {
    const std::vector<AxisWindow>& columns = windows.columns[static_cast<size_t>(x)];
    if (channels < lanes) {
      for (int64_t c = 0; c < channels; ++c) {
        A sum = 0;
        for (const AxisWindow& row : windows.rows) {
          for (const AxisWindow& column : columns) {
            const int64_t at = pixel_of(row, column) + c;
            if (static_cast<Mask<A>>(argmax[at]) == tap_of(row, column)) {
              sum += widen(gradients[at]);
            }
          }
        }
        to[c] = narrow<T>(sum);
      }
      continue;
    }
    // The last vector is moved back to end with the channels.
    for (int64_t i = 0; i < channels; i += lanes) {
      const int64_t c = std::min(i, channels - lanes);
      Vec<A> sum{};
      for (const AxisWindow& row : windows.rows) {
        for (const AxisWindow& column : columns) {
          const int64_t at = pixel_of(row, column) + c;
          const Vec<Mask<A>> wins =
              load_taps<A>(argmax + at) == broadcast<Mask<A>>(tap_of(row, column));
          sum += select<A>(wins, load_widened(gradients + at), Vec<A>{});
        }
      }
      store_narrowed(to + c, sum);
    }
  }
}

template <class T, class Tap>
void backward_nhwc(const MaxPool2dProblem& problem, const ThreadPool& pool, bool serial,
                   const T* gradients, const Tap* argmax, T* to) {
  const int64_t in_row = problem.in_width * problem.channels;
  const int64_t out_image = problem.out_height * problem.out_width * problem.channels;
  RowWindows all;
  all.columns.resize(static_cast<size_t>(problem.in_width));
  for (int64_t x = 0; x < problem.in_width; ++x) {
    windows_of(x, problem.out_width, problem.kernel_width, problem.stride_w, problem.pad_left,
               problem.dilation_w, all.columns[static_cast<size_t>(x)]);
  }
  parallel_for(pool, problem.batch * problem.in_height, serial, [&](int64_t begin, int64_t end) {
    RowWindows windows = all;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / problem.in_height;
      windows_of(task % problem.in_height, problem.out_height, problem.kernel_height,
                 problem.stride_h, problem.pad_top, problem.dilation_h, windows.rows);
      backward_nhwc_row(problem, windows, gradients + n * out_image, argmax + n * out_image,
                        to + task * in_row);
    }
  });
}

// A plane's gradients and taps: rows of `pitch`, of which the outputs begin at `left`.
template <class A, class Tap>
struct WidePlane {
  int64_t left, pitch;
  A* gradients;
  Tap* taps;
};

// The taps of the elements of one remainder, and by how many windows they are behind.
struct ColumnTap {
  int64_t tap, behind;
};

// The sums of elements j, j + 1, … of one remainder.
template <class A, class Tap>
CNNK_INLINE Vec<A> gather_windows(const MaxPool2dProblem& problem, const WidePlane<A, Tap>& plane,
                                  const std::vector<AxisWindow>& rows,
                                  const std::vector<ColumnTap>& columns, int64_t j) {
  Vec<A> sum{};
  for (const AxisWindow& row : rows) {
    const int64_t first = row.window * plane.pitch + plane.left + j;
    for (const ColumnTap& column : columns) {
      const int64_t at = first - column.behind;
      const auto tap = static_cast<Mask<A>>(row.tap * problem.kernel_width + column.tap);
      const Vec<Mask<A>> wins = load_taps<A>(plane.taps + at) == broadcast<Mask<A>>(tap);
      sum += select<A>(wins, load(plane.gradients + at), Vec<A>{});
    }
  }
  return sum;
}

template <class T, class Tap>
void backward_nchw(const MaxPool2dProblem& problem, const ThreadPool& pool, bool serial,
                   const T* gradients, const Tap* argmax, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  // A stride past the image leaves one window.
  const int64_t stride = std::min(problem.stride_w, problem.in_width + problem.pad_left);
  const int64_t in_plane = problem.in_height * problem.in_width;
  const int64_t out_plane = problem.out_height * problem.out_width;
  // Column x is element (x + pad) / stride of its remainder.
  const int64_t elements = (problem.in_width - 1 + problem.pad_left) / stride + 1;
  const int64_t vectors = ceil_div(elements, lanes);
  std::vector<std::vector<ColumnTap>> columns(static_cast<size_t>(stride));
  int64_t most_behind = 0;
  for (int64_t s = problem.kernel_width - 1; s >= 0; --s) {
    const int64_t behind = s * problem.dilation_w / stride;
    columns[static_cast<size_t>(s * problem.dilation_w % stride)].push_back({s, behind});
    most_behind = std::max(most_behind, behind);
  }
  const int64_t pitch = most_behind + std::max(vectors * lanes, problem.out_width);
  const int64_t plane_elements = problem.out_height * pitch;
  parallel_for(pool, problem.batch * problem.channels, serial, [&](int64_t begin, int64_t end) {
    const Workspace gradient_workspace(plane_elements * static_cast<int64_t>(sizeof(A)));
    const Workspace tap_workspace(plane_elements * static_cast<int64_t>(sizeof(Tap)));
    const Workspace row_workspace(vectors * lanes * stride * static_cast<int64_t>(sizeof(A)));
    const WidePlane<A, Tap> plane = {most_behind, pitch, gradient_workspace.as<A>(),
                                     tap_workspace.as<Tap>()};
    A* const row_sums = row_workspace.as<A>();
    std::fill_n(plane.gradients, plane_elements, A{0});
    std::fill_n(plane.taps, plane_elements, static_cast<Tap>(problem.no_winner()));
    std::vector<AxisWindow> rows;
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t y = 0; y < problem.out_height; ++y) {
        const int64_t from = task * out_plane + y * problem.out_width;
        widen_row(gradients + from, plane.gradients + y * pitch + plane.left, problem.out_width);
        std::copy_n(argmax + from, problem.out_width, plane.taps + y * pitch + plane.left);
      }
      for (int64_t y = 0; y < problem.in_height; ++y) {
        windows_of(y, problem.out_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                   problem.dilation_h, rows);
        for (int64_t j = 0; j < vectors * lanes; j += lanes) {
          if (stride == 1) {
            store(row_sums + j, gather_windows(problem, plane, rows, columns[0], j));
          } else if (stride == 2) {
            Vec<A> low, high;
            interleave_at<A>(gather_windows(problem, plane, rows, columns[0], j),
                             gather_windows(problem, plane, rows, columns[1], j), low, high,
                             std::make_index_sequence<lanes>{});
            store(row_sums + 2 * j, low);
            store(row_sums + 2 * j + lanes, high);
          } else {
            for (int64_t remainder = 0; remainder < stride; ++remainder) {
              store_first(
                  row_sums + j * stride + remainder,
                  gather_windows(problem, plane, rows, columns[static_cast<size_t>(remainder)], j),
                  lanes, stride);
            }
          }
        }
        narrow_row(row_sums + problem.pad_left, to + task * in_plane + y * problem.in_width,
                   problem.in_width);
      }
    }
  });
}

inline void backward(const MaxPool2dProblem& problem, const ThreadPool& pool,
                     const void* grad_output, const void* argmax, void* grad_input) {
  const int64_t in_elements =
      problem.batch * problem.channels * problem.in_height * problem.in_width;
  const bool serial = in_elements * element_size(problem.dtype) < kSerialBytes;
  with_dtype(problem.dtype, [&](auto element) {
    with_tap(problem, [&](auto tap) {
      using T = decltype(element);
      using Tap = decltype(tap);
      const auto run =
          problem.layout == Layout::nhwc ? backward_nhwc<T, Tap> : backward_nchw<T, Tap>;
      run(problem, pool, serial, static_cast<const T*>(grad_output),
          static_cast<const Tap*>(argmax), static_cast<T*>(grad_input));
    });
  });
}
