// Max pooling.
//
// NCHW: a band of rows of one plane is packed so that a vector of output
// columns reads contiguous elements (packed_planes.h), small enough to stay in
// the first-level cache; then max_pool2d_row.inl. NHWC: vectors along channels,
// read where they lie.

#include "kernels/cpu/max_pool2d_row.inl"
#include "kernels/cpu/pack_planes.inl"

template <class A>
void forward_nchw(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                  const ThreadPool& pool, const void* input, void* output,
                  const ArgmaxOut& argmax) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const PackedPlanes whole = packed_pool_input(problem);
  const PoolTables<A> tables(problem, whole);
  const int64_t rows_per_band = plan.rows_per_band;
  const int64_t bands = ceil_div(problem.out_height, rows_per_band);
  const int64_t band_packed_rows =
      (rows_per_band - 1) * problem.stride_h + (problem.kernel_height - 1) * problem.dilation_h + 1;
  const int64_t in_plane = problem.in_height * problem.in_width;
  const int64_t out_plane = problem.out_height * problem.out_width;
  const PlaneSource source = {problem.in_height, problem.in_width, in_plane, problem.in_width, 1};

  parallel_for(
      pool, problem.batch * problem.channels * bands, plan.threads == 1,
      [&](int64_t begin, int64_t end) {
        const Workspace workspace(
            (band_packed_rows * whole.pitch() + kLanes<A>)*static_cast<int64_t>(sizeof(A)));
        A* const packed_data = workspace.as<A>();
        for (int64_t task = begin; task < end; ++task) {
          const int64_t plane = task / bands;
          const int64_t y0 = task % bands * rows_per_band;
          const int64_t y1 = std::min(problem.out_height, y0 + rows_per_band);
          PackedPlanes packed = whole;
          packed.top = problem.pad_top - y0 * problem.stride_h;
          packed.rows = (y1 - y0 - 1) * problem.stride_h +
                        (problem.kernel_height - 1) * problem.dilation_h + 1;
          pack_planes_as<A>(problem.dtype, input, plane * in_plane, source, 1, packed, lowest,
                            packed_data);
          for (int64_t y = y0; y < y1; ++y) {
            const WindowRows rows = window_rows(problem, y);
            const PoolRow<A> row = {packed_data + (y - y0) * problem.stride_h * packed.pitch(),
                                    tables.row_taps.data(),
                                    problem.dilation_h * packed.pitch(),
                                    problem.kernel_height,
                                    problem.kernel_width,
                                    rows.first,
                                    rows.last,
                                    tables.first_column.data(),
                                    problem.out_width};
            pool_row<A>(row, problem.dtype, output, argmax,
                        plane * out_plane + y * problem.out_width, 1);
          }
        }
      });
}

template <class T>
void forward_nhwc(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                  const ThreadPool& pool, const T* input, T* output, const ArgmaxOut& argmax) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const int64_t channels = problem.channels;
  parallel_for(
      pool, problem.batch * problem.out_height, plan.threads == 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / problem.out_height;
          const int64_t y = task % problem.out_height;
          const WindowRows rows = window_rows(problem, y);
          const T* const image = input + n * problem.in_height * problem.in_width * channels;
          for (int64_t x = 0; x < problem.out_width; ++x) {
            const int64_t start = x * problem.stride_w - problem.pad_left;
            const int64_t first = start < 0 ? ceil_div(-start, problem.dilation_w) : 0;
            const int64_t room = problem.in_width - 1 - start;
            const int64_t last =
                std::min(problem.kernel_width, room < 0 ? 0 : room / problem.dilation_w + 1);
            const int64_t at = (task * problem.out_width + x) * channels;
            for (int64_t c = 0; c < channels; c += lanes) {
              const int64_t count = std::min(lanes, channels - c);
              Winner<A> winner;
              winner.value = broadcast<A>(lowest);
              winner.tap = broadcast<Mask<A>>(
                  static_cast<Mask<A>>(rows.first * problem.kernel_width + first));
              for (int64_t r = rows.first; r < rows.last; ++r) {
                const int64_t in_y =
                    y * problem.stride_h - problem.pad_top + r * problem.dilation_h;
                for (int64_t s = first; s < last; ++s) {
                  const T* const from =
                      image +
                      (in_y * problem.in_width + start + s * problem.dilation_w) * channels + c;
                  challenge<A>(winner,
                               count == lanes ? load_widened(from) : load_first(from, count, A{0}),
                               static_cast<Mask<A>>(r * problem.kernel_width + s));
                }
              }
              if (count == lanes) {
                store_narrowed(output + at + c, winner.value);
              } else {
                store_first(output + at + c, winner.value, count);
              }
              store_taps<A>(argmax, at + c, winner, count, 1);
            }
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
      forward_nhwc(problem, plan, pool, static_cast<const T*>(input), static_cast<T*>(output),
                   argmax);
    });
  }
}
