// Depthwise convolution of pixels of channels: vectors along the channels.
//
// Forward and input gradient hold the sums of 8 neighbouring pixels; a tap loads
// its vector of weights once and 8 of the source, which no border has been
// written around: a row is cut into segments whose pixels read the same taps.
// That is a load a multiply-add, the rate at which a core does both, and more
// than its share of the memory feeds. The weight gradient holds the sums of nine
// taps over a row.
//
// Groups of G channels, 2, 4 or 8, are the same with G products a tap: a lane takes the
// channels of its group one after the other, from a vector whose lanes are permuted.
//
// The backward pass goes over the output's gradient once, row by row, and gives
// both gradients while the rows it reads are in the second-level cache.

// Vectors that cover `channels`: the last is moved back to end with them.
template <class A, class Body>
CNNK_INLINE void for_each_channel_vector(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes<A> < channels; c += kLanes<A>) body(c);
  body(channels - kLanes<A>);
}

// Lane by lane, channel j of the G channels of the lane's group.
template <class A, int G>
struct GroupChannels {
  Vec<Mask<A>> lanes[G];

  GroupChannels() {
    for (int j = 0; j < G; ++j) {
      Mask<A> from[kLanes<A>];
      for (int i = 0; i < kLanes<A>; ++i) from[i] = static_cast<Mask<A>>(i / G * G + j);
      lanes[j] = load(from);
    }
  }

  CNNK_INLINE Vec<A> of(Vec<A> v, int j) const {
    if constexpr (G == 1) return v;
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
    if constexpr (std::is_same_v<A, float>) {
      return (Vec<float>)_mm512_permutexvar_ps((__m512i)lanes[j], (__m512)v);
    }
#elif CNNK_TIER_ID == 1
    if constexpr (std::is_same_v<A, float>) {
      return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes[j]);
    }
#endif
    Vec<A> result = v;
    for (int i = 0; i < kLanes<A>; ++i) result[i] = v[lanes[j][i]];
    return result;
  }
};

template <class T, int G>
struct NhwcRow {
  const T* source;                // of the image
  int64_t source_row;             // elements from one row to the next
  const Accumulator<T>* weights;  // [tap][channel of the group][channel]
  const Accumulator<T>* bias;     // or null
  int64_t channels, kernel_width;
  bool relu = false;
};

// Pixels j, …, j + P - 1 of a destination row, all of which read these taps. Many products
// are summed in chains.
template <class T, int P, int G, bool Chains>
CNNK_INLINE void nhwc_pixels(const NhwcRow<T, G>& row, const std::vector<AxisTap>& row_taps,
                             int64_t y, int64_t row_step, const std::vector<AxisTap>& column_taps,
                             int64_t j, int64_t column_step, T* out, int64_t out_pixel) {
  using A = Accumulator<T>;
  const int64_t channels = row.channels;
  const int64_t pixel = column_step * channels;
  const T* const source = row.source + j * pixel;
  const GroupChannels<A, G> group;
  for_each_channel_vector<A>(channels, [&](int64_t c) {
    Vec<A> sum[P];
    const Vec<A> start = row.bias != nullptr ? load(row.bias + c) : Vec<A>{};
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = start;
    Vec<A> total[P] = {};
    int64_t products = 0;
    for (const AxisTap& r : row_taps) {
      if (y < r.begin || y >= r.end) continue;
      const T* const source_row = source + (y * row_step + r.source) * row.source_row + c;
      const A* const weights = row.weights + r.kernel_index * row.kernel_width * G * channels + c;
      for (const AxisTap& s : column_taps) {
        const A* const w = weights + s.kernel_index * G * channels;
        const T* const from = source_row + s.source * channels;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const Vec<A> x = load_widened(from + p * pixel);
#pragma GCC unroll 8
          for (int i = 0; i < G; ++i) sum[p] += load(w + i * channels) * group.of(x, i);
        }
        if constexpr (Chains) {
          products += G;
          if (products < kSumLength) continue;
          products = 0;
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) {
            total[p] += sum[p];
            sum[p] = Vec<A>{};
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      store_narrowed(out + p * out_pixel + c,
                     relu_if<A>(row.relu, Chains ? sum[p] + total[p] : sum[p]));
    }
  });
}

// Three taps of a row that read neighbouring columns: a 3x3 kernel's, the commonest.
struct NeighbouringTaps {
  bool found;
  int64_t first;            // source
  int64_t kernel_index[3];  // by column
};

inline NeighbouringTaps neighbouring_taps(const std::vector<AxisTap>& taps) {
  NeighbouringTaps neighbours = {taps.size() == 3, 0, {-1, -1, -1}};
  if (!neighbours.found) return neighbours;
  neighbours.first = std::min({taps[0].source, taps[1].source, taps[2].source});
  for (const AxisTap& tap : taps) {
    const int64_t column = tap.source - neighbours.first;
    if (column < 3) neighbours.kernel_index[column] = tap.kernel_index;
  }
  for (const int64_t index : neighbours.kernel_index) {
    neighbours.found = neighbours.found && index >= 0;
  }
  return neighbours;
}

// The same for neighbouring taps and columns Step apart: a source vector is loaded once for
// all pixels that read it.
template <class T, int P, int Step>
void nhwc_pixels_of_neighbours(const NhwcRow<T, 1>& row, const std::vector<AxisTap>& row_taps,
                               int64_t y, int64_t row_step, const NeighbouringTaps& neighbours,
                               int64_t j, T* out, int64_t out_pixel) {
  using A = Accumulator<T>;
  const int64_t channels = row.channels;
  const T* const source = row.source + (j * Step + neighbours.first) * channels;
  for_each_channel_vector<A>(channels, [&](int64_t c) {
    Vec<A> sum[P];
    const Vec<A> start = row.bias != nullptr ? load(row.bias + c) : Vec<A>{};
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = start;
    // What the next row reads for the first time lies a row apart, where no prefetcher of the
    // processor's looks.
    const int64_t last_tap = row_taps.empty() ? 0 : row_taps.back().source;
    const T* ahead = source + ((y + 1) * row_step + last_tap) * row.source_row + c;
    for (const AxisTap& r : row_taps) {
      if (y < r.begin || y >= r.end) continue;
      constexpr int kFetched = (Step * P + 2) / 3;
#pragma GCC unroll 6
      for (int i = 0; i < kFetched; ++i) __builtin_prefetch(ahead + i * channels, 0, 2);
      ahead += kFetched * channels;
      const T* const from = source + (y * row_step + r.source) * row.source_row + c;
      const A* const weights = row.weights + r.kernel_index * row.kernel_width * channels + c;
      const Vec<A> weight[3] = {load(weights + neighbours.kernel_index[0] * channels),
                                load(weights + neighbours.kernel_index[1] * channels),
                                load(weights + neighbours.kernel_index[2] * channels)};
#pragma GCC unroll 18
      for (int i = 0; i < Step * (P - 1) + 3; ++i) {
        const Vec<A> x = load_widened(from + i * channels);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          // Column i is tap s of pixel (i - s) / Step.
          if (i >= s && (i - s) % Step == 0 && (i - s) / Step < P) {
            sum[(i - s) / Step] += weight[s] * x;
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      store_narrowed(out + p * out_pixel + c, relu_if<A>(row.relu, sum[p]));
    }
  });
}

// Destination row y of an image; `out` is its first element.
template <class T, int G>
void nhwc_row(const NhwcRow<T, G>& row, const DepthwisePasses& passes, int64_t y, T* out) {
  const int64_t classes = static_cast<int64_t>(passes.rows.size());
  const AxisPass& rows = passes.rows[static_cast<size_t>(y % classes)];
  for (const AxisPass& columns : passes.columns) {
    const int64_t out_pixel = columns.stride * row.channels;
    for (const AxisSegment& segment : columns.segments) {
      const auto tile = [&](int64_t j, auto pixels, auto chains) {
        nhwc_pixels<T, decltype(pixels)::value, G, decltype(chains)::value>(
            row, rows.taps, y / classes, rows.step, segment.taps, j, columns.step,
            out + columns.first * row.channels + j * out_pixel, out_pixel);
      };
      if constexpr (G == 1) {
        const NeighbouringTaps neighbours = neighbouring_taps(segment.taps);
        if (neighbours.found && rows.taps.size() <= 3 && columns.step <= 2) {
          for_each_pixel_tile(segment.begin, segment.end, [&](int64_t j, auto pixels) {
            constexpr int P = decltype(pixels)::value;
            T* const to = out + columns.first * row.channels + j * out_pixel;
            const auto run = columns.step == 1 ? nhwc_pixels_of_neighbours<T, P, 1>
                                               : nhwc_pixels_of_neighbours<T, P, 2>;
            run(row, rows.taps, y / classes, rows.step, neighbours, j, to, out_pixel);
          });
          continue;
        }
      }
      const bool chains =
          static_cast<int64_t>(rows.taps.size() * segment.taps.size()) * G > kSumLength;
      for_each_pixel_tile(segment.begin, segment.end, [&](int64_t j, auto pixels) {
        chains ? tile(j, pixels, std::true_type{}) : tile(j, pixels, std::false_type{});
      });
    }
  }
}

// Weights as [tap][channel of the group][channel]: of the results' channels, from those of
// the source, which are the outputs' if `backward`.
template <class T, int G>
void pack_taps(const Conv2dProblem& problem, const void* weight, bool backward,
               Accumulator<T>* to) {
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      for (int64_t i = 0; i < G; ++i) {
        for (int64_t k = 0; k < problem.out_channels; ++k) {
          const int64_t out = backward ? k / G * G + i : k, in = backward ? k % G : i;
          *to++ = weight_at<T>(problem, weight, out, in, r, s);
        }
      }
    }
  }
}

template <class T, int G>
void nhwc_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                  const void* input, const void* weight, const void* bias_data, void* output) {
  using A = Accumulator<T>;
  const int64_t channels = problem.out_channels;
  const int64_t taps = problem.kernel_height * problem.kernel_width * G;
  const Workspace workspace((taps + 1) * channels * static_cast<int64_t>(sizeof(A)));
  A* const weights = workspace.as<A>();
  pack_taps<T, G>(problem, weight, false, weights);
  const A* bias = nullptr;
  if (bias_data != nullptr) {
    widen_row(static_cast<const T*>(bias_data), weights + taps * channels, channels);
    bias = weights + taps * channels;
  }
  const DepthwisePasses passes = depthwise_forward_passes(problem);
  const int64_t in_row = problem.in_width * channels;
  const int64_t out_row = problem.out_width * channels;
  const int64_t rows = problem.out_height;
  const int64_t blocks = ceil_div(rows, plan.rows_per_task);
  parallel_for(pool, problem.batch * blocks, plan.threads == 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks;
      const int64_t y0 = task % blocks * plan.rows_per_task;
      const NhwcRow<T, G> row = {static_cast<const T*>(input) + image * problem.in_height * in_row,
                                 in_row,
                                 weights,
                                 bias,
                                 channels,
                                 problem.kernel_width,
                                 problem.relu};
      for (int64_t y = y0; y < std::min(rows, y0 + plan.rows_per_task); ++y) {
        nhwc_row(row, passes, y, static_cast<T*>(output) + (image * rows + y) * out_row);
      }
    }
  });
}

// What the next row of outputs reads for the first time: its gradients, and as many pixels of
// the input for each as strides skip. No prefetcher of the processor's follows a vector from
// pixel to pixel.
template <class T>
struct NextDepthwiseRow {
  const T* gradient;
  const T* source;  // of column 0 and the last kernel row
  int64_t source_row;
  bool strided_rows, strided_columns;

  CNNK_INLINE void fetch(int64_t j, int64_t channels, int64_t pixel, int64_t c) const {
    __builtin_prefetch(gradient + j * channels + c, 0, 2);
    const T* const from = source + j * pixel + c;
    __builtin_prefetch(from, 0, 2);
    if (strided_columns) __builtin_prefetch(from + channels, 0, 2);
    if (!strided_rows) return;
    __builtin_prefetch(from - source_row, 0, 2);
    if (strided_columns) __builtin_prefetch(from - source_row + channels, 0, 2);
  }
};

// sums[tap][channel of the group][slot] += the products of an output row's gradients with
// the taps' sources, columns [begin, end), which are one chain; a slot is a lane of a vector
// of channels. All columns in [inside_begin, inside_end) read all taps.
template <class T, int Taps, int G>
CNNK_INLINE void nhwc_weight_sums(const PlaneTap<T>* taps, const T* gradient, int64_t channels,
                                  int64_t begin, int64_t end, int64_t inside_begin,
                                  int64_t inside_end, int64_t column_step, int64_t c,
                                  Accumulator<T>* sums, int64_t slots,
                                  const NextDepthwiseRow<T>& next) {
  using A = Accumulator<T>;
  const int64_t pixel = column_step * channels;
  Vec<A> sum[Taps][G];
  const T* source[Taps];
  const GroupChannels<A, G> group;
#pragma GCC unroll 9
  for (int t = 0; t < Taps; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) sum[t][i] = Vec<A>{};
    source[t] = taps[t].source + c;
  }
  const auto add = [&](int t, Vec<A> g, int64_t j) __attribute__((always_inline)) {
    const Vec<A> x = load_widened(source[t] + j * pixel);
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) sum[t][i] += g * group.of(x, i);
  };
  const auto border = [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      const Vec<A> g = load_widened(gradient + j * channels + c);
#pragma GCC unroll 9
      for (int t = 0; t < Taps; ++t) {
        if (j >= taps[t].begin && j < taps[t].end) add(t, g, j);
      }
    }
  };
  const int64_t inside_from = std::clamp(inside_begin, begin, end);
  const int64_t inside_to = std::clamp(inside_end, inside_from, end);
  border(begin, inside_from);
  for (int64_t j = inside_from; j < inside_to; ++j) {
    next.fetch(j, channels, pixel, c);
    const Vec<A> g = load_widened(gradient + j * channels + c);
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) add(t, g, j);
  }
  border(inside_to, end);
#pragma GCC unroll 9
  for (int t = 0; t < Taps; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      A* const to = sums + (taps[t].weight * G + i) * slots;
      store(to, load(to) + sum[t][i]);
    }
  }
}

// Sums move to double after so many rows.
constexpr int64_t kDepthwiseRowsPerSum = 16;

template <class A>
void move_sums(A* sums, int64_t count, double* totals) {
  for (int64_t i = 0; i < count; ++i) totals[i] += sums[i];
  std::fill_n(sums, count, A{0});
}

// The weight gradient of one row of outputs at a time.
template <class T, int G>
class NhwcWeightSums {
 public:
  NhwcWeightSums(const Conv2dProblem& problem, int64_t channels)
      : passes_(depthwise_forward_passes(problem)),
        channels_(channels),
        slots_(round_up(channels, kLanes<Accumulator<T>>)),
        in_row_(problem.in_width * channels),
        out_row_(problem.out_width * channels),
        kernel_width_(problem.kernel_width),
        stride_h_(problem.stride_h),
        stride_w_(problem.stride_w),
        inside_end_(passes_.columns[0].count) {
    for (const AxisTap& s : passes_.columns[0].taps) {
      inside_begin_ = std::max(inside_begin_, s.begin);
      inside_end_ = std::min(inside_end_, s.end);
    }
    inside_end_ = std::max(inside_begin_, inside_end_);
  }

  // sums[tap][slot] += those of row y of an image. `taps` is storage for the taps of a row.
  void add_row(const T* image, const T* gradients, int64_t y, std::vector<PlaneTap<T>>& taps,
               Accumulator<T>* sums) const {
    const AxisPass& rows = passes_.rows[0];
    const AxisPass& columns = passes_.columns[0];
    taps.clear();
    for (const AxisTap& r : rows.taps) {
      if (y < r.begin || y >= r.end) continue;
      for (const AxisTap& s : columns.taps) {
        taps.push_back({image + (y * rows.step + r.source) * in_row_ + s.source * channels_,
                        r.kernel_index * kernel_width_ + s.kernel_index, s.begin, s.end});
      }
    }
    const int64_t last_tap = rows.taps.empty() ? 0 : rows.taps.back().source;
    const NextDepthwiseRow<T> next = {gradients + (y + 1) * out_row_,
                                      image + ((y + 1) * rows.step + last_tap) * in_row_, in_row_,
                                      stride_h_ > 1, stride_w_ > 1};
    int64_t slot = 0;
    for_each_channel_vector<Accumulator<T>>(channels_, [&](int64_t c) {
      const auto tile = [&](int64_t t, auto tile_taps) {
        for (int64_t j = 0; j < columns.count; j += kSumLength) {
          nhwc_weight_sums<T, decltype(tile_taps)::value, G>(
              taps.data() + t, gradients + y * out_row_, channels_, j,
              std::min(columns.count, j + kSumLength), inside_begin_, inside_end_, columns.step, c,
              sums + slot, slots_, next);
        }
      };
      const int64_t count = static_cast<int64_t>(taps.size());
      if constexpr (G == 1) {
        for_each_tap_tile(count, tile);
      } else {
        for (int64_t t = 0; t < count; ++t) tile(t, Constant<1>{});
      }
      slot += kLanes<Accumulator<T>>;
    });
  }

 private:
  DepthwisePasses passes_;
  int64_t channels_, slots_, in_row_, out_row_, kernel_width_, stride_h_, stride_w_;
  int64_t inside_begin_ = 0, inside_end_;
};

template <class T, int G>
void nhwc_backward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                   const void* grad_output_data, const void* input_data, const void* weight,
                   void* grad_input_data, void* grad_weight_data) {
  using A = Accumulator<T>;
  const int64_t channels = problem.out_channels;
  const int64_t taps = problem.kernel_height * problem.kernel_width * G;
  const int64_t slots = round_up(channels, kLanes<A>);
  const int64_t in_row = problem.in_width * channels;
  const int64_t out_row = problem.out_width * channels;
  const int64_t out_rows = problem.out_height;
  const bool wants_input = grad_input_data != nullptr, wants_weight = grad_weight_data != nullptr;

  const int64_t chunks = depthwise_gradient_chunks(problem);
  const Workspace weights_workspace(taps * channels * static_cast<int64_t>(sizeof(A)));
  A* const weights = weights_workspace.as<A>();
  if (wants_input) pack_taps<T, G>(problem, weight, true, weights);
  const int64_t table = taps * slots;
  const Workspace totals_workspace(
      wants_weight ? chunks * table * static_cast<int64_t>(sizeof(double)) : 0);
  double* const totals = totals_workspace.as<double>();

  const DepthwisePasses to_input = depthwise_gradient_passes(problem);
  const NhwcWeightSums<T, G> weight_sums(problem, channels);

  const int64_t all_rows = problem.batch * out_rows;
  parallel_for(pool, chunks, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace sums_workspace(table * static_cast<int64_t>(sizeof(A)));
    A* const sums = sums_workspace.as<A>();
    std::vector<PlaneTap<T>> taps_of_row;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* const chunk_totals = totals + chunk * table;
      if (wants_weight) {
        std::fill_n(sums, table, A{0});
        std::fill_n(chunk_totals, table, 0.0);
      }
      const int64_t first = all_rows * chunk / chunks, last = all_rows * (chunk + 1) / chunks;
      for (int64_t index = first; index < last; ++index) {
        const int64_t image = index / out_rows, y = index % out_rows;
        const T* const gradients =
            static_cast<const T*>(grad_output_data) + image * out_rows * out_row;
        if (wants_input) {
          // The input rows of an output row: a stride's worth; the last has the rest.
          const NhwcRow<T, G> row = {gradients, out_row,  weights,
                                     nullptr,   channels, problem.kernel_width};
          const int64_t i0 = std::min(problem.in_height, y * problem.stride_h);
          const int64_t i1 = y == out_rows - 1
                                 ? problem.in_height
                                 : std::min(problem.in_height, (y + 1) * problem.stride_h);
          for (int64_t i = i0; i < i1; ++i) {
            nhwc_row(row, to_input, i,
                     static_cast<T*>(grad_input_data) + (image * problem.in_height + i) * in_row);
          }
        }
        if (!wants_weight) continue;
        weight_sums.add_row(static_cast<const T*>(input_data) + image * problem.in_height * in_row,
                            gradients, y, taps_of_row, sums);
        if ((index - first) % kDepthwiseRowsPerSum == kDepthwiseRowsPerSum - 1) {
          move_sums(sums, table, chunk_totals);
        }
      }
      if (wants_weight) move_sums(sums, table, chunk_totals);
    }
  });
  if (!wants_weight) return;
  for (int64_t i = 0; i < table; ++i) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) totals[i] += totals[chunk * table + i];
  }
  for (int64_t k = 0; k < channels; ++k) {
    // The last vector's lanes are those of the last channels.
    const int64_t whole = slots - kLanes<A>;
    const int64_t slot = k < whole ? k : k - (channels - kLanes<A>)+whole;
    for (int64_t i = 0; i < G; ++i) {
      T* const to = static_cast<T*>(grad_weight_data) + k * problem.weight_stride_k +
                    i * problem.weight_stride_c;
      for (int64_t r = 0; r < problem.kernel_height; ++r) {
        for (int64_t s = 0; s < problem.kernel_width; ++s) {
          const int64_t tap = r * problem.kernel_width + s;
          to[r * problem.weight_stride_r + s * problem.weight_stride_s] =
              narrow<T>(static_cast<A>(totals[(tap * G + i) * slots + slot]));
        }
      }
    }
  }
}
