// Max pooling of 3x3 windows at stride 2 in NCHW, as first layers have.
//
// A window's last row is the first of the window below. So a strip of windows, a vector
// wide, goes down a band of rows: the winners of a row's three columns are found once,
// for each of two new rows a window, and the shared row's stay in registers. Columns
// are split on the way to the registers, and one of padding is a lane of -inf, so that
// no row is copied. A strip reads its cache lines of a band again for the next strip, so a
// band's input, 16 KiB, stays in the first-level cache.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"

constexpr int below_lane(int i) { return i == 0 ? 0 : i - 1; }

// The winners of three columns of one row for `count` windows from x on.
template <bool WithTap, class T>
CNNK_INLINE Winner<Accumulator<T>> pool_columns(const T* row, int64_t x, int64_t pad_left,
                                                int64_t count) {
  using A = Accumulator<T>;
  Winner<A> winner = {Vec<A>{}, Vec<Mask<A>>{}};
  EvenOdd<A> others;
  if (pad_left == 0) {
    const EvenOdd<A> columns = load_columns(row + 2 * x, count);
    winner.value = columns.even;
    others = {columns.odd, load_columns(row + 2 * x + 1, count).odd};
  } else {
    others = load_columns(row + 2 * x, count);
    if (x > 0) {
      winner.value = load_columns(row + 2 * x - 1, count).even;
    } else {
      const auto first = lane_numbers<Mask<A>>() == Vec<Mask<A>>{};
      winner.value = select<A>(first, broadcast(-std::numeric_limits<A>::infinity()),
                               shuffled<A, below_lane>(others.odd, others.odd));
      winner.tap = first ? broadcast<Mask<A>>(1) : winner.tap;
    }
  }
  challenge<A, WithTap>(winner, others.even, 1);
  challenge<A, WithTap>(winner, others.odd, 2);
  return winner;
}

template <bool WithTap, class T>
void shared_rows_forward_of(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                            const ThreadPool& pool, const T* input, T* output, uint8_t* argmax,
                            int32_t clipped) {
  using A = Accumulator<T>;
  const int64_t width = problem.out_width, in_width = problem.in_width;
  for_each_band(problem, plan, pool, [&](int64_t plane, int64_t y0, int64_t y1) {
    const T* const image = input + plane * problem.in_height * in_width;
    for_each_known_vector<A>(width, [&](int64_t x, auto count) {
      const auto row = [&](int64_t y) {
        return pool_columns<WithTap>(image + y * in_width, x, problem.pad_left, count);
      };
      Winner<A> shared{};
      if (2 * y0 >= problem.pad_top) shared = row(2 * y0 - problem.pad_top);
      for (int64_t y = y0; y < y1; ++y) {
        const int64_t top = 2 * y - problem.pad_top;
        fetch_ahead(image + (top + 1) * in_width + 2 * x, 2 * count * sizeof(T));
        fetch_ahead(image + (top + 2) * in_width + 2 * x, 2 * count * sizeof(T));
        Winner<A> winner = shared;
        const Winner<A> middle = row(top + 1);
        if (top >= 0) {
          challenge_row<A, WithTap>(winner, middle, 3);
        } else {
          winner = middle;
          winner.tap += broadcast<Mask<A>>(3);
        }
        if (top + 2 < problem.in_height) {
          shared = row(top + 2);
          challenge_row<A, WithTap>(winner, shared, 6);
        }
        const int64_t at = (plane * problem.out_height + y) * width + x;
        store_winners<WithTap>(output, {argmax, true, clipped}, at, count, winner);
      }
    });
  });
}

inline void shared_rows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                const ThreadPool& pool, const void* input, void* output,
                                void* argmax, bool clips) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run =
        argmax != nullptr ? &shared_rows_forward_of<true, T> : &shared_rows_forward_of<false, T>;
    run(problem, plan, pool, static_cast<const T*>(input), static_cast<T*>(output),
        static_cast<uint8_t*>(argmax), clips ? static_cast<int32_t>(problem.no_winner()) : -1);
  });
}
