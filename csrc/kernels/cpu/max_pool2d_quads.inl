// Max pooling of 2x2 windows at stride 2 in NCHW, by far the commonest.
//
// A window's four elements are the even and odd columns of two rows: two vectors of
// each row, split on the way to the registers, are a vector of windows, whose maximum
// and tap take three comparisons. No two windows share an element, so the backward
// writes each once: the gradient where the argmax names the element, zero elsewhere,
// two vectors of gradients interleaved to a row of the input. Rows shorter than a
// vector are masked; the last vector of others is moved back to end with the row. All
// is one pass over memory, so that bands (16 KiB of input) only share out the work.
// Four taps and no winner fit a byte: the argmax is uint8_t.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"

// The inverse of load_columns.
template <class T>
CNNK_INLINE void store_columns(T* p, Vec<Accumulator<T>> even, Vec<Accumulator<T>> odd,
                               int64_t count) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const LowHigh<A> columns = interleaved<A>(even, odd);
  const int64_t rest = 2 * count - lanes;
  if (rest >= 0) {
    store_narrowed(p, columns.low);
  } else {
    store_head(p, columns.low, 2 * count);
  }
  if (rest >= lanes) {
    store_narrowed(p + lanes, columns.high);
  } else if (rest > 0) {
    store_head(p + lanes, columns.high, rest);
  }
}

template <bool WithTap, class T>
CNNK_INLINE void pool_quads(const T* top, const T* bottom, int64_t count, T* output,
                            uint8_t* argmax, int32_t clipped) {
  using A = Accumulator<T>;
  const EvenOdd<A> first = load_columns(top, count), second = load_columns(bottom, count);
  Winner<A> winner = {first.even, Vec<Mask<A>>{}};
  challenge<A, WithTap>(winner, first.odd, 1);
  challenge<A, WithTap>(winner, second.even, 2);
  challenge<A, WithTap>(winner, second.odd, 3);
  store_winners<WithTap>(output, {argmax, true, clipped}, 0, count, winner);
}

// Returns where an argmax is none that a window has.
template <class T>
CNNK_INLINE Vec<Mask<Accumulator<T>>> spread_quads(const T* gradients, const uint8_t* argmax,
                                                   int64_t count, T* top, T* bottom) {
  using A = Accumulator<T>;
  const bool whole = count == kLanes<A>;
  // Of a negative zero torch's sum makes a positive one.
  const Vec<A> gradient =
      (whole ? load_widened(gradients) : load_head(gradients, count)) + Vec<A>{};
  const Vec<Mask<A>> taps = whole ? load_taps<A>(argmax) : load_taps_head<A>(argmax, count);
  const auto won = [&](Mask<A> tap) {
    return select<A>(taps == broadcast<Mask<A>>(tap), gradient, Vec<A>{});
  };
  store_columns(top, won(0), won(1), count);
  store_columns(bottom, won(2), won(3), count);
  return taps > broadcast<Mask<A>>(4);
}

template <bool WithTap, class T>
void quads_forward_of(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                      const ThreadPool& pool, const T* input, T* output, uint8_t* argmax,
                      int32_t clipped) {
  const int64_t width = problem.out_width, in_width = problem.in_width;
  for_each_band(problem, plan, pool, [&](int64_t plane, int64_t y0, int64_t y1) {
    for (int64_t y = y0; y < y1; ++y) {
      const T* const top = input + (plane * problem.in_height + 2 * y) * in_width;
      const int64_t at = (plane * problem.out_height + y) * width;
      for_each_known_vector<Accumulator<T>>(width, [&](int64_t x, auto count) {
        fetch_ahead(top + 4 * x, 4 * count * sizeof(T));
        pool_quads<WithTap>(top + 2 * x, top + in_width + 2 * x, count, output + at + x,
                            WithTap ? argmax + at + x : nullptr, clipped);
      });
    }
  });
}

template <class T>
void quads_backward_of(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                       const ThreadPool& pool, const T* grad_output, const uint8_t* argmax,
                       T* grad_input) {
  using A = Accumulator<T>;
  const int64_t width = problem.out_width, in_width = problem.in_width;
  for_each_band(problem, plan, pool, [&](int64_t plane, int64_t y0, int64_t y1) {
    T* const image = grad_input + plane * problem.in_height * in_width;
    const int64_t first = plane * problem.out_height * width;
    Vec<Mask<A>> foreign{};
    for (int64_t y = y0; y < y1; ++y) {
      T* const top = image + 2 * y * in_width;
      const int64_t at = first + y * width;
      for_each_known_vector<A>(width, [&](int64_t x, auto count) {
        foreign |= spread_quads(grad_output + at + x, argmax + at + x, count, top + 2 * x,
                                top + in_width + 2 * x);
      });
      // A last column that no window has.
      for (int64_t x = 2 * width; x < in_width; ++x) top[x] = top[in_width + x] = T{};
    }
    if (y1 == problem.out_height) {
      std::fill(image + 2 * y1 * in_width, image + problem.in_height * in_width, T{});
    }
    if (!any(foreign)) return;
    WinnerPositions(problem).check(
        y0, y1, [&](int64_t y, int64_t x) { return argmax[first + y * width + x]; });
  });
}

inline void quads_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                          const ThreadPool& pool, const void* input, void* output, void* argmax,
                          bool clips) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = argmax != nullptr ? &quads_forward_of<true, T> : &quads_forward_of<false, T>;
    run(problem, plan, pool, static_cast<const T*>(input), static_cast<T*>(output),
        static_cast<uint8_t*>(argmax), clips ? static_cast<int32_t>(problem.no_winner()) : -1);
  });
}

inline void quads_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                           const ThreadPool& pool, const void* grad_output, const void* argmax,
                           void* grad_input) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    quads_backward_of(problem, plan, pool, static_cast<const T*>(grad_output),
                      static_cast<const uint8_t*>(argmax), static_cast<T*>(grad_input));
  });
}
