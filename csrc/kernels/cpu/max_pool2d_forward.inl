// Max pooling.
//
// NCHW: vectors along a row of a plane, which is read where it lies, and at
// stride 2 split into its even and odd columns on the way to the registers.
// With a border, a greater stride or a 16-bit type, a band of rows is packed
// first (packed_planes.h), small enough to stay in the first-level cache. NHWC:
// vectors along channels, read where they lie. Large windows that overlap are
// pooled row by row first (max_pool2d_separable.inl). Without argmax no tap is
// kept.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"
#include "kernels/cpu/max_pool2d_row_nhwc.inl"
#include "kernels/cpu/max_pool2d_separable.inl"
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
    const RowMaxima<A> maxima(plan.separable ? reach : 0, round_up(problem.out_width, lanes));
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
      const PoolRow<A> row = {
          rows_source,           tables.row_taps.data(), problem.dilation_h * pitch,
          problem.kernel_height, problem.kernel_width,   tables.first_column.data(),
          problem.out_width,     deinterleaves};
      const PooledOut out = {
          problem.dtype,     output, argmax, plane * out_plane + y0 * problem.out_width,
          problem.out_width, 1};
      if (plan.separable) {
        pool_rows_separably<A>(problem, row, y0, y1, pitch, out, maxima);
      } else {
        pool_rows<A>(problem, row, y0, y1, problem.stride_h * pitch, out);
      }
    }
  });
}

// NHWC.

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
          const WindowRange rows = window_rows(problem, y);
          const T* const row =
              input + n * in_image +
              (y * problem.stride_h - problem.pad_top) * problem.in_width * channels;
          for (int64_t x = 0; x < problem.out_width; ++x) {
            const int64_t start = x * problem.stride_w - problem.pad_left;
            const int64_t count = elements.count(rows, window_columns(problem, x));
            const int64_t at = (task * problem.out_width + x) * channels;
            pool_pixel<WithTap>(elements.data(), count, row + start * channels, 0, channels,
                                [&](int64_t c, int64_t lanes, const auto& winner) {
                                  store_winners<WithTap>(output, argmax, at + c, lanes, winner);
                                });
          }
        }
      });
}

inline void forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                    const ThreadPool& pool, const void* input, void* output, void* argmax_data,
                    bool clips) {
  const ArgmaxOut argmax = {argmax_data, problem.compact_argmax(),
                            clips ? static_cast<int32_t>(problem.no_winner()) : -1};
  if (problem.layout == Layout::nchw) {
    with_accumulator(problem.dtype, [&](auto accumulator) {
      forward_nchw<decltype(accumulator)>(problem, plan, pool, input, output, argmax);
    });
  } else {
    with_dtype(problem.dtype, [&](auto element) {
      using T = decltype(element);
      const auto direct = argmax_data != nullptr ? &forward_nhwc<true, T> : &forward_nhwc<false, T>;
      const auto separable =
          argmax_data != nullptr ? &separable_nhwc<true, T> : &separable_nhwc<false, T>;
      const auto run = plan.separable ? separable : direct;
      run(problem, plan, pool, static_cast<const T*>(input), static_cast<T*>(output), argmax);
    });
  }
}
