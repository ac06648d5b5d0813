// Max pooling of large windows that overlap, in two passes: the maximum of every
// row of a window, then the maximum of these. A row's maximum serves all windows
// that hold the row, so that an output takes about kernel_width + kernel_height
// comparisons in place of their product.
//
// The order of the passes gives torch's winner: the first of equals in a row, and
// then the first row; the last NaN of the last row that has one. Van Herk's
// algorithm (1992; Gil and Werman, 1993) takes three comparisons a pass whatever
// the window, but two more rows to write and read a pass; windows of networks are
// smaller than what that pays for.

// The maxima of the last `rows` input rows, and their columns in the window.
template <class A>
class RowMaxima {
 public:
  RowMaxima(int64_t rows, int64_t length)
      : rows_(rows),
        length_(length),
        workspace_(std::max<int64_t>(1, rows * length) *
                   static_cast<int64_t>(sizeof(A) + sizeof(Mask<A>))) {}
  A* values(int64_t row) const { return workspace_.as<A>() + row % rows_ * length_; }
  Mask<A>* columns(int64_t row) const {
    return reinterpret_cast<Mask<A>*>(workspace_.as<A>() + rows_ * length_) + row % rows_ * length_;
  }

 private:
  int64_t rows_, length_;
  Workspace workspace_;
};

// The winner of a window whose rows' maxima lie at element `at` of `maxima`; the
// window's first row is `top`. `winners` holds what a window of -inf has.
template <bool WithTap, int Vectors, class A>
CNNK_INLINE void pool_maxima(const MaxPool2dProblem& problem, const RowMaxima<A>& maxima,
                             const WindowRange& rows, int64_t top, int64_t at, Winner<A>* winners) {
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const int64_t row = top + r * problem.dilation_h;
    const A* const values = maxima.values(row) + at;
    const Mask<A>* const columns = maxima.columns(row) + at;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Winner<A> row_winner = {load(values + v * kLanes<A>), Vec<Mask<A>>{}};
      if constexpr (WithTap) row_winner.tap = load(columns + v * kLanes<A>);
      challenge_row<A, WithTap>(winners[v], row_winner,
                                static_cast<Mask<A>>(r * problem.kernel_width));
    }
  }
}

// NCHW: as pool_rows, but rows follow one another `pitch` elements apart.
template <bool WithTap, class A>
void pool_rows_separably_with(const MaxPool2dProblem& problem, PoolRow<A> row, int64_t y0,
                              int64_t y1, int64_t pitch, const PooledOut& out,
                              const RowMaxima<A>& maxima) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const A* const source = row.source;
  row.last_row = 1;
  // Rows above have their maxima, those that a window may still need; none lies
  // above the image.
  int64_t done = std::max<int64_t>(0, problem.pad_top - y0 * problem.stride_h);
  for (int64_t y = y0; y < y1; ++y) {
    const WindowRange rows = window_rows(problem, y);
    const int64_t top = (y - y0) * problem.stride_h;
    done = std::max(done, top);
    for (; done <= top + (rows.last - 1) * problem.dilation_h; ++done) {
      row.source = source + done * pitch;
      for_each_vector<A>(row.width, [&](int64_t x, int64_t) {
        const Winner<A> winner = row.deinterleaves ? pool_window<WithTap, true, 0>(row, x)
                                                   : pool_window<WithTap, false, 0>(row, x);
        store(maxima.values(done) + x, winner.value);
        if constexpr (WithTap) store(maxima.columns(done) + x, winner.tap);
      });
    }
    const int64_t at = out.at + (y - y0) * out.row_stride;
    for_each_vector<A>(row.width, [&](int64_t x, int64_t count) {
      const Vec<Mask<A>> first =
          load(row.first_column + x) +
          broadcast<Mask<A>>(static_cast<Mask<A>>(rows.first * problem.kernel_width));
      Winner<A> winner = {broadcast<A>(lowest), first};
      pool_maxima<WithTap, 1>(problem, maxima, rows, top, x, &winner);
      store_out<A>(out.dtype, out.values, at + x * out.step, winner.value, count, out.step);
      if constexpr (WithTap) {
        store_taps<A>(out.argmax, at + x * out.step, winner, count, out.step);
      }
    });
  }
}

template <class A>
void pool_rows_separably(const MaxPool2dProblem& problem, const PoolRow<A>& row, int64_t y0,
                         int64_t y1, int64_t pitch, const PooledOut& out,
                         const RowMaxima<A>& maxima) {
  const auto run = out.argmax.data != nullptr ? &pool_rows_separably_with<true, A>
                                              : &pool_rows_separably_with<false, A>;
  run(problem, row, y0, y1, pitch, out, maxima);
}

// NHWC: a task is a band of rows of some channels of an image, so that the maxima
// of a window's rows stay in the second-level cache.
template <bool WithTap, class T>
void separable_nhwc(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                    const ThreadPool& pool, const T* input, T* output, const ArgmaxOut& argmax) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const int64_t channels = problem.channels;
  const int64_t block = std::min(round_up(channels, lanes), 4 * lanes);
  const int64_t blocks = ceil_div(channels, block);
  const int64_t bands = ceil_div(problem.out_height, plan.rows_per_band);
  const int64_t in_row = problem.in_width * channels;
  const int64_t reach = (problem.kernel_height - 1) * problem.dilation_h + 1;
  parallel_for(
      pool, problem.batch * blocks * bands, plan.threads == 1, [&](int64_t begin, int64_t end) {
        const RowMaxima<A> maxima(reach, problem.out_width * block);
        WindowElements<A> elements(problem);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / bands / blocks;
          const int64_t c0 = task / bands % blocks * block;
          const int64_t c1 = std::min(channels, c0 + block);
          const int64_t y0 = task % bands * plan.rows_per_band;
          const int64_t y1 = std::min(problem.out_height, y0 + plan.rows_per_band);
          int64_t done = 0;  // rows above have their maxima, those that a window may still need
          for (int64_t y = y0; y < y1; ++y) {
            const WindowRange rows = window_rows(problem, y);
            const int64_t top = y * problem.stride_h - problem.pad_top;
            done = std::max(done, top);
            for (; done <= top + (rows.last - 1) * problem.dilation_h; ++done) {
              const T* const row = input + (n * problem.in_height + done) * in_row;
              for (int64_t x = 0; x < problem.out_width; ++x) {
                const int64_t count = elements.count({0, 1}, window_columns(problem, x));
                const T* const window = row + (x * problem.stride_w - problem.pad_left) * channels;
                const int64_t at = x * block - c0;
                pool_pixel<WithTap>(elements.data(), count, window, c0, c1,
                                    [&](int64_t c, int64_t, const Winner<A>& winner) {
                                      store(maxima.values(done) + at + c, winner.value);
                                      if constexpr (WithTap) {
                                        store(maxima.columns(done) + at + c, winner.tap);
                                      }
                                    });
              }
            }
            for (int64_t x = 0; x < problem.out_width; ++x) {
              const int64_t first =
                  rows.first * problem.kernel_width + window_columns(problem, x).first;
              const Winner<A> none = {broadcast<A>(lowest),
                                      broadcast<Mask<A>>(static_cast<Mask<A>>(first))};
              const int64_t at = ((n * problem.out_height + y) * problem.out_width + x) * channels;
              const auto pool_vectors = [&](int64_t c, auto vectors) {
                constexpr int kVectors = decltype(vectors)::value;
                Winner<A> winners[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) winners[v] = none;
                pool_maxima<WithTap, kVectors>(problem, maxima, rows, top, x * block + c - c0,
                                               winners);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  const int64_t channel = c + v * lanes;
                  store_winners<WithTap>(output, argmax, at + channel,
                                         std::min(lanes, c1 - channel), winners[v]);
                }
              };
              int64_t c = c0;
              for (; c + kChannelVectors * lanes <= c1; c += kChannelVectors * lanes) {
                pool_vectors(c, Constant<kChannelVectors>{});
              }
              for (; c < c1; c += lanes) pool_vectors(c, Constant<1>{});
            }
          }
        }
      });
}
