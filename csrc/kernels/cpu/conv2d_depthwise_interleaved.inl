// Depthwise convolution of planes whose rows make poor vectors: strided, or short.
//
// The planes of a vector of channels are transposed, so that their pixels become
// vectors of channels as in channels_last, convolved by those kernels
// (conv2d_depthwise_nhwc.inl), and transposed back. A transpose of 16 x 16 elements
// takes 64 shuffles, a quarter of an instruction an element and direction; a row of
// seven pixels leaves half of a vector empty, and a stride splits it in phases.

#include "kernels/cpu/conv2d_depthwise_nhwc.inl"

// Pixels of up to a vector of channels as [pixel][lane]; whole vectors of pixels.
template <class T>
void interleave_planes(const T* from, int64_t channels, int64_t pixels, Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < pixels; i += lanes) {
    Vec<A> rows[lanes];
    for (int64_t c = 0; c < lanes; ++c) {
      const T* const plane = from + c * pixels + i;
      rows[c] = c >= channels         ? Vec<A>{}
                : i + lanes <= pixels ? load_widened(plane)
                                      : load_head(plane, pixels - i);
    }
    transpose<A>(rows);
    for (int64_t p = 0; p < lanes; ++p) store(to + (i + p) * lanes, rows[p]);
  }
}

template <class T>
void deinterleave_planes(const Accumulator<T>* from, int64_t channels, int64_t pixels, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < pixels; i += lanes) {
    Vec<A> rows[lanes];
    for (int64_t p = 0; p < lanes; ++p) rows[p] = load(from + (i + p) * lanes);
    transpose<A>(rows);
    for (int64_t c = 0; c < channels; ++c) {
      T* const plane = to + c * pixels + i;
      if (i + lanes <= pixels) {
        store_narrowed(plane, rows[c]);
      } else {
        store_head(plane, rows[c], pixels - i);
      }
    }
  }
}

// Weights of a block of channels as [tap][lane], zero past the last channel.
template <class T>
void interleave_weights(const Conv2dProblem& problem, const void* weight, int64_t c,
                        int64_t channels, Accumulator<T>* to) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        *to++ =
            lane < channels ? weight_at<T>(problem, weight, c + lane, 0, r, s) : Accumulator<T>{0};
      }
    }
  }
}

template <class T>
void interleaved_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                         const ThreadPool& pool, const void* input, const void* weight,
                         const void* bias_data, void* output) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = problem.out_channels, blocks = ceil_div(channels, lanes);
  const int64_t in_pixels = problem.in_height * problem.in_width;
  const int64_t out_pixels = problem.out_height * problem.out_width;
  const int64_t table = problem.kernel_height * problem.kernel_width * lanes;
  const DepthwisePasses passes = depthwise_forward_passes(problem);
  parallel_for(pool, problem.batch * blocks, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const int64_t in_size = round_up(in_pixels, lanes) * lanes;
    const int64_t out_size = round_up(out_pixels, lanes) * lanes;
    const Workspace workspace((in_size + out_size + table + lanes) *
                              static_cast<int64_t>(sizeof(A)));
    A* const source = workspace.as<A>();
    A* const result = source + in_size;
    A* const weights = result + out_size;
    A* const bias = weights + table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % blocks * lanes, count = std::min(lanes, channels - c);
      const int64_t plane = task / blocks * channels + c;
      interleave_weights<T>(problem, weight, c, count, weights);
      if (bias_data != nullptr) store(bias, load_head(static_cast<const T*>(bias_data) + c, count));
      interleave_planes(static_cast<const T*>(input) + plane * in_pixels, count, in_pixels, source);
      const NhwcRow<A, 1> row = {
          source, problem.in_width * lanes, weights,     bias_data != nullptr ? bias : nullptr,
          lanes,  problem.kernel_width,     problem.relu};
      for (int64_t y = 0; y < problem.out_height; ++y) {
        nhwc_row(row, passes, y, result + y * problem.out_width * lanes);
      }
      deinterleave_planes(result, count, out_pixels, static_cast<T*>(output) + plane * out_pixels);
    }
  });
}

template <class T>
void interleaved_backward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                          const ThreadPool& pool, const void* grad_output, const void* input,
                          const void* weight, void* grad_input, void* grad_weight) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = problem.out_channels, blocks = ceil_div(channels, lanes);
  const int64_t in_pixels = problem.in_height * problem.in_width;
  const int64_t out_pixels = problem.out_height * problem.out_width;
  const int64_t table = problem.kernel_height * problem.kernel_width * lanes;
  const bool wants_input = grad_input != nullptr, wants_weight = grad_weight != nullptr;
  const DepthwisePasses to_input = depthwise_gradient_passes(problem);
  const NhwcWeightSums<A, 1> weight_sums(problem, lanes);
  // Images are summed in ranges, a number of them that no count of threads changes.
  constexpr int64_t kMostRanges = 8;
  const int64_t ranges = std::clamp<int64_t>(problem.batch, 1, kMostRanges);
  const Workspace totals_workspace(
      wants_weight ? ranges * blocks * table * static_cast<int64_t>(sizeof(double)) : 0);
  double* const totals = totals_workspace.as<double>();
  parallel_for(pool, ranges * blocks, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const int64_t in_size = round_up(in_pixels, lanes) * lanes;
    const int64_t out_size = round_up(out_pixels, lanes) * lanes;
    const Workspace workspace((in_size + out_size + 2 * table) * static_cast<int64_t>(sizeof(A)));
    A* const image = workspace.as<A>();  // of the input, then of its gradient
    A* const gradient = image + in_size;
    A* const weights = gradient + out_size;
    A* const sums = weights + table;
    std::vector<PlaneTap<A>> taps_of_row;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % blocks * lanes, count = std::min(lanes, channels - c);
      const int64_t range = task / blocks;
      double* const task_totals = totals + task * table;
      if (wants_weight) std::fill_n(task_totals, table, 0.0);
      if (wants_input) interleave_weights<T>(problem, weight, c, count, weights);
      for (int64_t n = problem.batch * range / ranges; n < problem.batch * (range + 1) / ranges;
           ++n) {
        const int64_t plane = n * channels + c;
        interleave_planes(static_cast<const T*>(grad_output) + plane * out_pixels, count,
                          out_pixels, gradient);
        if (wants_weight) {
          interleave_planes(static_cast<const T*>(input) + plane * in_pixels, count, in_pixels,
                            image);
          std::fill_n(sums, table, A{0});
          for (int64_t y = 0; y < problem.out_height; ++y) {
            weight_sums.add_row(image, gradient, y, taps_of_row, sums);
            if (y % kDepthwiseRowsPerSum == kDepthwiseRowsPerSum - 1) {
              move_sums(sums, table, task_totals);
            }
          }
          move_sums(sums, table, task_totals);
        }
        if (wants_input) {
          const NhwcRow<A, 1> row = {gradient, problem.out_width * lanes, weights, nullptr,
                                     lanes,    problem.kernel_width};
          for (int64_t y = 0; y < problem.in_height; ++y) {
            nhwc_row(row, to_input, y, image + y * problem.in_width * lanes);
          }
          deinterleave_planes(image, count, in_pixels,
                              static_cast<T*>(grad_input) + plane * in_pixels);
        }
      }
    }
  });
  if (!wants_weight) return;
  for (int64_t k = 0; k < channels; ++k) {
    T* const to = static_cast<T*>(grad_weight) + k * problem.weight_stride_k;
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      for (int64_t s = 0; s < problem.kernel_width; ++s) {
        double total = 0;
        for (int64_t range = 0; range < ranges; ++range) {
          total += totals[(range * blocks + k / lanes) * table +
                          (r * problem.kernel_width + s) * lanes + k % lanes];
        }
        to[r * problem.weight_stride_r + s * problem.weight_stride_s] =
            narrow<T>(static_cast<A>(total));
      }
    }
  }
}
