// Pooled outputs: the maximum and the tap that it was found at stay in registers
// over the window.
//
// One row of a plane: vectors along the row. Elements outside of the image are
// -inf, which never replaces a maximum; where nothing does, the result is the
// window's first tap inside of the image.

template <class A>
struct PoolRow {
  const A* source;          // position of output column 0, window row 0
  const int64_t* row_taps;  // kernel_width offsets of a window row's taps
  int64_t row_step;         // from one window row to the next
  int64_t kernel_height, kernel_width;
  const Mask<A>* first_column;  // of each output column: its first tap inside
  int64_t width;
  bool deinterleaves;                   // stride 2 in a plain row; else neighbours read neighbours
  int64_t first_row = 0, last_row = 0;  // window rows inside of the image: [first, last)
};

template <class A>
struct Winner {
  Vec<A> value;
  Vec<Mask<A>> tap;
};

// torch's order: a greater value or a NaN replaces the maximum.
template <class A, bool WithTap = true>
CNNK_INLINE void challenge(Winner<A>& winner, Vec<A> value, Mask<A> tap) {
  const Vec<Mask<A>> wins = (value > winner.value) | (value != value);
  winner.value = select<A>(wins, value, winner.value);
  if constexpr (WithTap) winner.tap = wins ? broadcast<Mask<A>>(tap) : winner.tap;
}

// The same for a row's winner, whose taps count from `first_tap`.
template <class A, bool WithTap>
CNNK_INLINE void challenge_row(Winner<A>& winner, const Winner<A>& row, Mask<A> first_tap) {
  const Vec<Mask<A>> wins = (row.value > winner.value) | (row.value != row.value);
  winner.value = select<A>(wins, row.value, winner.value);
  if constexpr (WithTap) winner.tap = wins ? row.tap + broadcast<Mask<A>>(first_tap) : winner.tap;
}

// Kernel: the window's width where that is known, else 0.
template <bool WithTap, bool Deinterleaves, int Kernel, class A>
CNNK_INLINE Winner<A> pool_window(const PoolRow<A>& row, int64_t x) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const int64_t width = Kernel > 0 ? Kernel : row.kernel_width;
  Winner<A> winner;
  winner.value = broadcast<A>(lowest);
  winner.tap =
      load(row.first_column + x) + broadcast<Mask<A>>(static_cast<Mask<A>>(row.first_row * width));
  for (int64_t r = row.first_row; r < row.last_row; ++r) {
    const auto meet = [&](int64_t s, Vec<A> value) {
      challenge<A, WithTap>(winner, value, static_cast<Mask<A>>(r * width + s));
    };
    if constexpr (Deinterleaves) {
      const A* const source = row.source + r * row.row_step + 2 * x;
      int64_t s = 0;
#pragma GCC unroll 2
      for (; s + 2 <= width; s += 2) {
        const EvenOdd<A> columns = load_even_odd(source + s);
        meet(s, columns.even);
        meet(s + 1, columns.odd);
      }
      // The last column of an odd window: nothing is read that no window has.
      if (s < width) meet(s, load_even_odd(source + s - 1).odd);
    } else {
      const A* const source = row.source + r * row.row_step + x;
#pragma GCC unroll 3
      for (int64_t s = 0; s < width; ++s) meet(s, load(source + row.row_taps[s]));
    }
  }
  return winner;
}

// Where the taps of winners go: uint8_t or int32_t elements, or nowhere. Windows
// whose maximum is not positive hold `clipped` instead; -1 if there is no ReLU.
struct ArgmaxOut {
  void* data;
  bool compact;
  int32_t clipped;
};

template <class A, class Tap>
CNNK_INLINE void store_taps_as(Tap* to, Vec<Mask<A>> taps, int64_t count, int64_t step) {
  constexpr int lanes = kLanes<A>;
  typedef Tap Narrow __attribute__((vector_size(lanes * sizeof(Tap))));
  const Narrow narrow_taps = __builtin_convertvector(taps, Narrow);
  if (step == 1 && count == lanes) {
    __builtin_memcpy(to, &narrow_taps, sizeof narrow_taps);
    return;
  }
  Tap values[lanes < 8 ? 8 : lanes] = {};  // copy_taps moves eight bytes at a time
  __builtin_memcpy(values, &narrow_taps, sizeof narrow_taps);
  if (step == 1) return copy_taps(values, to, count);
  for (int64_t i = 0; i < count; ++i) to[i * step] = values[i];
}

// Stores `count` winners' taps from element `at` on, `step` elements apart.
template <class A>
CNNK_INLINE void store_taps(const ArgmaxOut& out, int64_t at, const Winner<A>& winner,
                            int64_t count, int64_t step) {
  if (out.data == nullptr) return;
  Vec<Mask<A>> taps = winner.tap;
  if (out.clipped >= 0) {
    taps = winner.value <= Vec<A>{} ? broadcast<Mask<A>>(out.clipped) : taps;  // NaN passes
  }
  if (out.compact) {
    store_taps_as<A>(static_cast<uint8_t*>(out.data) + at, taps, count, step);
  } else {
    store_taps_as<A>(static_cast<int32_t*>(out.data) + at, taps, count, step);
  }
}

template <bool WithTap, class T>
CNNK_INLINE void store_winners(T* output, const ArgmaxOut& argmax, int64_t at, int64_t count,
                               const Winner<Accumulator<T>>& winner) {
  if (count == kLanes<Accumulator<T>>) {
    store_narrowed(output + at, winner.value);
  } else {
    store_head(output + at, winner.value, count);
  }
  if constexpr (WithTap) store_taps<Accumulator<T>>(argmax, at, winner, count, 1);
}

// The parts of a PoolRow that are the same for every row of a problem.
template <class A>
struct PoolTables {
  std::vector<int64_t> row_taps;
  std::vector<Mask<A>> first_column;

  PoolTables(const MaxPool2dProblem& problem, const PackedPlanes& packed) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      row_taps.push_back(packed.column_offset(s * problem.dilation_w));
    }
    first_column.assign(round_up(problem.out_width, kLanes<A>), 0);
    for (int64_t x = 0; x < problem.out_width; ++x) {
      const int64_t outside = problem.pad_left - x * problem.stride_w;
      if (outside > 0)
        first_column[x] = static_cast<Mask<A>>(ceil_div(outside, problem.dilation_w));
    }
  }
};

// Rows or columns of a window: [first, last).
struct WindowRange {
  int64_t first, last;
  bool operator==(const WindowRange& other) const {
    return first == other.first && last == other.last;
  }
};

// The part of the window that starts at `start` which lies inside of an axis.
CNNK_INLINE WindowRange window_range(int64_t start, int64_t extent, int64_t kernel,
                                     int64_t dilation) {
  const int64_t room = extent - 1 - start;
  if (start >= 0 && room >= (kernel - 1) * dilation) return {0, kernel};
  const int64_t first = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t last = room < 0 ? 0 : room / dilation + 1;
  return {first, std::min(kernel, last)};
}

CNNK_INLINE WindowRange window_rows(const MaxPool2dProblem& problem, int64_t y) {
  return window_range(y * problem.stride_h - problem.pad_top, problem.in_height,
                      problem.kernel_height, problem.dilation_h);
}

CNNK_INLINE WindowRange window_columns(const MaxPool2dProblem& problem, int64_t x) {
  return window_range(x * problem.stride_w - problem.pad_left, problem.in_width,
                      problem.kernel_width, problem.dilation_w);
}

// Where rows of pooled outputs go: elements of `dtype` and taps, from element
// `at` on, `step` apart in a row.
struct PooledOut {
  DType dtype;
  void* values;
  ArgmaxOut argmax;
  int64_t at, row_stride, step;
};

// Calls body with x and a number of lanes for vectors that cover [0, width); the
// last one is moved back to end there.
template <class A, class Body>
CNNK_INLINE void for_each_vector(int64_t width, Body&& body) {
  const int64_t count = std::min<int64_t>(kLanes<A>, width);
  for (int64_t next = 0; next < width; next += kLanes<A>) {
    body(std::min(next, width - count), count);
  }
}

template <bool WithTap, bool Deinterleaves, int Kernel, class A>
void pool_rows_of(const MaxPool2dProblem& problem, PoolRow<A> row, int64_t y0, int64_t y1,
                  int64_t row_stride, const PooledOut& out) {
  for (int64_t y = y0; y < y1; ++y, row.source += row_stride) {
    const WindowRange rows = window_rows(problem, y);
    row.first_row = rows.first;
    row.last_row = rows.last;
    const int64_t at = out.at + (y - y0) * out.row_stride;
    for_each_vector<A>(row.width, [&](int64_t x, int64_t count) {
      const Winner<A> winner = pool_window<WithTap, Deinterleaves, Kernel>(row, x);
      store_out<A>(out.dtype, out.values, at + x * out.step, winner.value, count, out.step);
      if constexpr (WithTap) {
        store_taps<A>(out.argmax, at + x * out.step, winner, count, out.step);
      }
    });
  }
}

// Pools the output rows [y0, y1): `row` describes the first, and the next one's
// window begins `row_stride` elements further.
template <class A>
void pool_rows(const MaxPool2dProblem& problem, const PoolRow<A>& row, int64_t y0, int64_t y1,
               int64_t row_stride, const PooledOut& out) {
  const auto run = [&](auto with_tap, auto deinterleaves, auto kernel) {
    pool_rows_of<decltype(with_tap)::value, decltype(deinterleaves)::value,
                 decltype(kernel)::value>(problem, row, y0, y1, row_stride, out);
  };
  const auto run_kernel = [&](auto with_tap, auto deinterleaves) {
    if (row.kernel_width == 2) return run(with_tap, deinterleaves, Constant<2>{});
    if (row.kernel_width == 3) return run(with_tap, deinterleaves, Constant<3>{});
    run(with_tap, deinterleaves, Constant<0>{});
  };
  const auto run_source = [&](auto with_tap) {
    if (row.deinterleaves) return run_kernel(with_tap, std::true_type{});
    run_kernel(with_tap, std::false_type{});
  };
  if (out.argmax.data != nullptr) {
    run_source(std::true_type{});
  } else {
    run_source(std::false_type{});
  }
}

// For windows that are read where they lie, of any type.

// Even and odd ones of the 2 * count elements from p on; what follows is not read.
template <class T>
CNNK_INLINE EvenOdd<Accumulator<T>> load_columns(const T* p, int64_t count) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t rest = 2 * count - lanes;
  const Vec<A> low = rest >= 0 ? load_widened(p) : load_head(p, 2 * count);
  const Vec<A> high = rest >= lanes ? load_widened(p + lanes)
                      : rest > 0    ? load_head(p + lanes, rest)
                                    : Vec<A>{};
  return {shuffled<A, even_lane>(low, high), shuffled<A, odd_lane>(low, high)};
}

// Fetches as many bytes as the caller is about to read at `from`, from further on: what no
// cache holds then comes in time.
template <class T>
CNNK_INLINE void fetch_ahead(const T* from, size_t bytes) {
  constexpr size_t kAhead = 2048;
  const char* const ahead = reinterpret_cast<const char*>(from) + kAhead;
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
}

// for_each_vector with a number of lanes that is known where it is a whole vector's.
template <class A, class Body>
CNNK_INLINE void for_each_known_vector(int64_t width, Body&& body) {
  constexpr Constant<kLanes<A>> lanes;
  if (width < lanes.value) return body(0, width);
  for (int64_t x = 0; x < width; x += lanes.value) body(std::min(x, width - lanes.value), lanes);
}

// Calls body with the plane and output rows [y0, y1) of each task.
template <class Body>
void for_each_band(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                   const ThreadPool& pool, Body&& body) {
  const int64_t bands = ceil_div(problem.out_height, plan.rows_per_band);
  parallel_for(pool, problem.batch * problem.channels * bands, plan.threads == 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t y0 = task % bands * plan.rows_per_band;
                   body(task / bands, y0, std::min(problem.out_height, y0 + plan.rows_per_band));
                 }
               });
}
