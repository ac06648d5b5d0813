// Depthwise convolution of planes: vectors along the rows.
//
// A task packs one plane, its left and right border written out and its columns
// split by phase (packed_planes.h), and convolves it while it is in the cache.
// Eight vectors of results live in registers, of one row or of several: short
// rows would not hide the latency of a multiply-add. Rows above and below the
// plane are left out, not packed.
//
// The weight gradient holds the sums of nine taps over a plane's rows; the
// backward pass gives both gradients of a channel while its planes are at hand.

#include "kernels/cpu/pack_planes.inl"

// pack_planes for one plane whose columns are not split: small planes are many, and
// its generality would cost more than their convolution.
template <class T>
CNNK_INLINE void pack_plane(const T* plane, const PlaneSource& source, const PackedPlanes& packed,
                            Accumulator<T>* out) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  if (packed.phases != 1 || source.width > 8 * lanes) {
    pack_planes(plane, source, 1, packed, A{0}, out);
    return;
  }
  const int64_t copied = std::min(source.width, packed.row_length - packed.left);
  const int64_t whole = copied / lanes * lanes;
  for (int64_t y = 0; y < packed.rows; ++y, plane += source.width, out += packed.row_length) {
    for (int64_t i = 0; i < packed.left; ++i) out[i] = A{0};
    A* const to = out + packed.left;
    for (int64_t i = 0; i < whole; i += lanes) store(to + i, load_widened(plane + i));
    // A vector may reach past the row: what it overwrites there is written later.
    if (whole < copied) store(to + whole, load_head(plane + whole, copied - whole));
    for (int64_t i = packed.left + round_up(copied, lanes); i < packed.row_length; ++i) {
      out[i] = A{0};
    }
  }
}

// A packed plane may be read up to a vector past its end.
template <class A>
int64_t packed_size(const PackedPlanes& packed) {
  return packed.plane() + kLanes<A>;
}

// P vectors of results, numbered over the vectors of the rows of a segment, with
// the taps of those rows and columns.
template <class Out, class A, int P>
CNNK_INLINE void nchw_vectors(const A* packed, int64_t row_elements,
                              const std::vector<PlaneTap<A>>& taps, const A* weights, A bias,
                              bool relu, int64_t first_row, int64_t number, int64_t width, Out* out,
                              int64_t out_row) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t vectors = ceil_div(width, lanes);
  // The last vector of a row is moved back to end with it.
  const int64_t last_start = std::max<int64_t>(0, width - lanes);
  const A* source[P];
  Out* to[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const int64_t row = first_row + (number + p) / vectors;
    const int64_t start = std::min((number + p) % vectors * lanes, last_start);
    source[p] = packed + row * row_elements + start;
    to[p] = out + row * out_row + start;
  }
  Vec<A> sum[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = broadcast(bias);
  for (const PlaneTap<A>& tap : taps) {
    const Vec<A> w = broadcast(weights[tap.weight]);
    const int64_t offset = tap.source - packed;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] += w * load(source[p] + offset);
  }
  const int64_t count = std::min(lanes, width);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const Vec<A> result = relu_if<A>(relu, sum[p]);
    if (count == lanes) {
      store_narrowed(to[p], result);
    } else {
      store_head(to[p], result, count);
    }
  }
}

// One plane of one channel as it is convolved: its packed source, and the passes.
template <class T>
struct NchwPlane {
  const Accumulator<T>* packed;
  const PackedPlanes& geometry;
  const DepthwisePasses& passes;
  const Accumulator<T>* weights;  // [r][s]
  int64_t kernel_width;
  Accumulator<T> bias;
  bool relu = false;
};

// The taps of a segment of rows and a pass of columns.
template <class A>
void plane_taps(const A* packed, const PackedPlanes& geometry, int64_t kernel_width,
                const AxisSegment& rows, const AxisPass& columns, std::vector<PlaneTap<A>>& taps) {
  taps.clear();
  for (const AxisTap& r : rows.taps) {
    for (const AxisTap& s : columns.taps) {
      taps.push_back(
          {packed + r.source * geometry.pitch() + geometry.column_offset(s.source + geometry.left),
           r.kernel_index * kernel_width + s.kernel_index, s.begin, s.end});
    }
  }
}

// The results of one pass of columns, in rows `out_row` apart; `out` is where the
// plane's first result lies.
template <class T, class Out>
void nchw_columns(const NchwPlane<T>& plane, const AxisPass& columns,
                  std::vector<PlaneTap<Accumulator<T>>>& taps, Out* out, int64_t out_row) {
  using A = Accumulator<T>;
  const int64_t vectors = ceil_div(columns.count, kLanes<A>);
  for (const AxisPass& rows : plane.passes.rows) {
    for (const AxisSegment& segment : rows.segments) {
      plane_taps(plane.packed, plane.geometry, plane.kernel_width, segment, columns, taps);
      for_each_pixel_tile(0, (segment.end - segment.begin) * vectors, [&](int64_t i, auto tile) {
        nchw_vectors<Out, A, decltype(tile)::value>(
            plane.packed, rows.step * plane.geometry.pitch(), taps, plane.weights, plane.bias,
            plane.relu, segment.begin, i, columns.count, out + rows.first * out_row,
            rows.stride * out_row);
      });
    }
  }
}

// Writes all results of a plane of `height` x `width`. Results of several passes
// of columns wait in `scratch` to be interleaved.
template <class T>
void nchw_plane(const NchwPlane<T>& plane, int64_t height, int64_t width,
                std::vector<PlaneTap<Accumulator<T>>>& taps, Accumulator<T>* scratch, T* out) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const std::vector<AxisPass>& passes = plane.passes.columns;
  if (passes.size() == 1) {
    nchw_columns<T, T>(plane, passes[0], taps, out, width);
    return;
  }
  const int64_t count = static_cast<int64_t>(passes.size());
  const int64_t row = round_up(ceil_div(width, count), lanes);
  for (int64_t p = 0; p < count; ++p) {
    nchw_columns<T, A>(plane, passes[static_cast<size_t>(p)], taps, scratch + p * height * row,
                       row);
  }
  for (int64_t y = 0; y < height; ++y) {
    const A* const from = scratch + y * row;
    T* const to = out + y * width;
    int64_t x = 0;
    for (; count == 2 && x + 2 * lanes <= width; x += 2 * lanes) {
      Vec<A> low, high;
      interleave_at<A>(load(from + x / 2), load(from + height * row + x / 2), low, high,
                       std::make_index_sequence<static_cast<size_t>(lanes)>{});
      store_narrowed(to + x, low);
      store_narrowed(to + x + lanes, high);
    }
    for (; x < width; ++x) to[x] = narrow<T>(from[x % count * height * row + x / count]);
  }
}

inline int64_t interleave_size(const DepthwisePasses& passes, int64_t height, int64_t width,
                               int64_t lanes) {
  const int64_t count = static_cast<int64_t>(passes.columns.size());
  return count == 1 ? 0 : count * height * round_up(ceil_div(width, count), lanes);
}

// One channel's weights as [r][s].
template <class T>
void channel_weights(const Conv2dProblem& problem, const void* weight, int64_t k,
                     Accumulator<T>* to) {
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      *to++ = weight_at<T>(problem, weight, k, 0, r, s);
    }
  }
}

template <class T>
void nchw_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                  const void* input, const void* weight, const void* bias, void* output) {
  using A = Accumulator<T>;
  const int64_t channels = problem.out_channels;
  const int64_t in_plane = problem.in_height * problem.in_width;
  const int64_t out_plane = problem.out_height * problem.out_width;
  const int64_t kernel = problem.kernel_height * problem.kernel_width;
  const DepthwisePasses passes = depthwise_forward_passes(problem);
  const PackedPlanes geometry = depthwise_packed_plane(passes.columns, problem.in_height);
  const PlaneSource source = plane_source(Layout::nchw, 1, problem.in_height, problem.in_width);
  parallel_for(pool, problem.batch * channels, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace((packed_size<A>(geometry) + kernel) *
                              static_cast<int64_t>(sizeof(A)));
    A* const packed = workspace.as<A>();
    A* const weights = packed + packed_size<A>(geometry);
    std::vector<PlaneTap<A>> taps;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % channels;
      channel_weights<T>(problem, weight, k, weights);
      pack_plane(static_cast<const T*>(input) + i * in_plane, source, geometry, packed);
      const A channel_bias = bias == nullptr ? A{0} : widen(static_cast<const T*>(bias)[k]);
      nchw_plane<T>(
          {packed, geometry, passes, weights, problem.kernel_width, channel_bias, problem.relu},
          problem.out_height, problem.out_width, taps, nullptr,
          static_cast<T*>(output) + i * out_plane);
    }
  });
}

// totals[tap] += the products of output rows [begin, end) of a plane's gradients
// with the taps' sources.
template <class T, int Taps>
void nchw_weight_sums(const PlaneTap<Accumulator<T>>* taps, const T* gradient, int64_t begin,
                      int64_t end, int64_t width, int64_t source_row, double* totals) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  // A lane's chain ends after so many steps.
  constexpr int64_t kSteps = 64;
  const int64_t rows_per_sum = std::max<int64_t>(1, kSteps / ceil_div(width, lanes));
  const int64_t whole = width / lanes * lanes;
  const Vec<Mask<A>> tail = first_lanes<A>(width - whole);
  for (int64_t row = begin; row < end;) {
    const int64_t last = std::min(end, row + rows_per_sum);
    Vec<A> sum[Taps];
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) sum[t] = Vec<A>{};
    for (; row < last; ++row) {
      const T* const gradients = gradient + row * width;
      const int64_t at = row * source_row;
      for (int64_t x = 0; x < whole; x += lanes) {
        const Vec<A> g = load_widened(gradients + x);
#pragma GCC unroll 9
        for (int t = 0; t < Taps; ++t) sum[t] += g * load(taps[t].source + at + x);
      }
      if (whole < width) {
        // What lies past the row may be infinite: a zero gradient alone would make
        // NaN of it.
        const Vec<A> g = load_head(gradients + whole, width - whole);
#pragma GCC unroll 9
        for (int t = 0; t < Taps; ++t) {
          sum[t] += g * select<A>(tail, load(taps[t].source + at + whole), Vec<A>{});
        }
      }
    }
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) totals[taps[t].weight] += sum_lanes<A>(sum[t]);
  }
}

template <class T>
void nchw_backward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                   const void* grad_output_data, const void* input_data, const void* weight,
                   void* grad_input_data, void* grad_weight_data) {
  using A = Accumulator<T>;
  const bool wants_input = grad_input_data != nullptr, wants_weight = grad_weight_data != nullptr;
  const int64_t channels = problem.out_channels;
  const int64_t in_plane = problem.in_height * problem.in_width;
  const int64_t out_plane = problem.out_height * problem.out_width;
  const int64_t kernel = problem.kernel_height * problem.kernel_width;
  const DepthwisePasses to_input = depthwise_gradient_passes(problem);
  const DepthwisePasses to_output = depthwise_forward_passes(problem);
  const AxisPass& rows = to_output.rows[0];
  const PackedPlanes gradient_geometry =
      depthwise_packed_plane(to_input.columns, problem.out_height);
  const PackedPlanes geometry = depthwise_packed_plane(to_output.columns, problem.in_height);
  const PlaneSource in_source = plane_source(Layout::nchw, 1, problem.in_height, problem.in_width);
  const PlaneSource out_source =
      plane_source(Layout::nchw, 1, problem.out_height, problem.out_width);
  const int64_t packed_count =
      std::max(packed_size<A>(geometry), packed_size<A>(gradient_geometry));
  const int64_t scratch_count =
      interleave_size(to_input, problem.in_height, problem.in_width, kLanes<A>);
  // A task: a channel over all images, so that its sums have one order.
  parallel_for(pool, channels, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace((packed_count + scratch_count + kernel) *
                              static_cast<int64_t>(sizeof(A)));
    A* const packed = workspace.as<A>();
    A* const scratch = packed + packed_count;
    A* const weights = scratch + scratch_count;
    std::vector<PlaneTap<A>> taps;
    std::vector<double> totals(static_cast<size_t>(kernel));
    for (int64_t k = begin; k < end; ++k) {
      if (wants_input) channel_weights<T>(problem, weight, k, weights);
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t n = 0; n < problem.batch; ++n) {
        const int64_t plane = n * channels + k;
        const T* const gradient = static_cast<const T*>(grad_output_data) + plane * out_plane;
        if (wants_input) {
          pack_plane(gradient, out_source, gradient_geometry, packed);
          nchw_plane<T>({packed, gradient_geometry, to_input, weights, problem.kernel_width, A{0}},
                        problem.in_height, problem.in_width, taps, scratch,
                        static_cast<T*>(grad_input_data) + plane * in_plane);
        }
        if (!wants_weight) continue;
        pack_plane(static_cast<const T*>(input_data) + plane * in_plane, in_source, geometry,
                   packed);
        for (const AxisSegment& segment : rows.segments) {
          plane_taps(packed, geometry, problem.kernel_width, segment, to_output.columns[0], taps);
          for_each_tap_tile(static_cast<int64_t>(taps.size()), [&](int64_t t, auto tile) {
            nchw_weight_sums<T, decltype(tile)::value>(taps.data() + t, gradient, segment.begin,
                                                       segment.end, problem.out_width,
                                                       rows.step * geometry.pitch(), totals.data());
          });
        }
      }
      if (!wants_weight) continue;
      T* const to = static_cast<T*>(grad_weight_data) + k * problem.weight_stride_k;
      for (int64_t r = 0; r < problem.kernel_height; ++r) {
        for (int64_t s = 0; s < problem.kernel_width; ++s) {
          to[r * problem.weight_stride_r + s * problem.weight_stride_s] =
              narrow<T>(static_cast<A>(totals[static_cast<size_t>(r * problem.kernel_width + s)]));
        }
      }
    }
  });
}
