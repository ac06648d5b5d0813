// Pooling of any windows in both layouts, and what follows the argmax.
//
// Forward, a thread takes one window. In NHWC that is the window of as many channels as 16 bytes
// hold, and all accesses are of that width; elsewhere of one channel, where the threads of a warp
// take neighbouring columns. Windows that overlap meet in the first-level cache.
//
// The backward is a gather: a thread takes one element of the input, or 16 bytes of channels, and
// goes over the windows that cover it, in torch's order. Each adds its gradient where its argmax is
// the tap by which it covers the element. Undilated windows need no division for that, and those of
// common sizes no loop. So every element is written once, nothing is set to zero before, and no two
// threads add to one place.
#include "kernels/cuda/max_pool2d_device.cuh"

namespace cnnkernels::cuda {
namespace {

// Windows that the compiler knows: square, of so many taps a side, and undilated; 0 for any.
constexpr int kAnyWindow = 0;

// The taps of a window that starts at `start` and lie in [0, size), along one axis.
struct TapRange {
  int begin, end;
};
template <bool kDilated>
__device__ inline TapRange taps_inside(int start, int size, int kernel, int dilation) {
  int begin = start < 0 ? -start : 0, end = size - start;
  if constexpr (kDilated) {
    begin = (begin + dilation - 1) / dilation;
    end = (end + dilation - 1) / dilation;
  }
  return {begin, end < kernel ? end : kernel};
}

// All taps of these windows take all registers, so that another kernel clips them.
constexpr int kClipless = 5;

template <class T, class Tap, int kWidth, bool kArgmax, int kWindow, bool kDilated>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    windows_forward_kernel(PoolGeometry g, const T* input, T* output, Tap* argmax) {
  using A = Accumulator<T>;
  const Position position = thread_position();
  const int channel = position.channel * kWidth;
  if (position.pixel >= g.out_height * g.out_width || channel >= g.channels) return;
  const int top = position.pixel / g.out_width * g.stride_h - g.pad_top;
  const int left = position.pixel % g.out_width * g.stride_w - g.pad_left;
  const TapRange rows = taps_inside<kDilated>(top, g.in_height, g.kernel_height, g.dilation_h);
  const TapRange columns = taps_inside<kDilated>(left, g.in_width, g.kernel_width, g.dilation_w);
  for (int64_t image = position.image; image < g.images; image += position.image_step) {
    const T* const first = input + image * g.in_height * g.in_width * g.channels + channel;
    Winner<A> winners[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      winners[v] = {minus_infinity<A>(), rows.begin * g.kernel_width + columns.begin};
    }
    const auto challenge = [&](int r, int s) {
      const int row = top + (kDilated ? r * g.dilation_h : r);
      const int column = left + (kDilated ? s * g.dilation_w : s);
      const auto elements =
          load_vector<kWidth>(first + int64_t{row * g.in_width + column} * g.channels);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        winners[v].challenge(to_accumulator(elements[v]), r * g.kernel_width + s);
      }
    };
    if constexpr (kWindow != kAnyWindow) {
#pragma unroll
      for (int r = 0; r < kWindow; ++r) {
        if (r < rows.begin || r >= rows.end) continue;
#pragma unroll
        for (int s = 0; s < kWindow; ++s) {
          if (s >= columns.begin && s < columns.end) challenge(r, s);
        }
      }
    } else {
      for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 2
        for (int s = columns.begin; s < columns.end; ++s) challenge(r, s);
      }
    }
    const int64_t window =
        (image * g.out_height * g.out_width + position.pixel) * g.channels + channel;
    Vector<T, kWidth> values;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) values[v] = from_accumulator<T>(winners[v].value);
    store_vector<kWidth>(output + window, values);
    if constexpr (kArgmax) {
      Vector<Tap, kWidth> taps;
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
        taps[v] =
            static_cast<Tap>(kWindow == kClipless ? winners[v].tap : saved_tap(g, winners[v]));
      store_vector<kWidth>(argmax + window, taps);
    }
  }
}

// The windows that may cover a position, along one axis: `position` counts from the border's edge.
struct WindowRange {
  int begin, end;
};
__device__ inline WindowRange windows_over(int position, int windows, int extent, int stride) {
  const int begin = position < extent ? 0 : (position - extent) / stride + 1;
  const int end = position / stride + 1;
  return {begin, end < windows ? end : windows};
}

// With a kWindow, windows at stride kStride.
template <class T, class Tap, int kWidth, int kWindow, int kStride, bool kDilated>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    windows_backward_kernel(PoolGeometry g, const T* grad_output, const Tap* argmax,
                            T* grad_input) {
  using A = Accumulator<T>;
  const Position position = thread_position();
  const int channel = position.channel * kWidth;
  if (position.pixel >= g.in_height * g.in_width || channel >= g.channels) return;
  const int top = position.pixel / g.in_width + g.pad_top;
  const int left = position.pixel % g.in_width + g.pad_left;
  for (int64_t image = position.image; image < g.images; image += position.image_step) {
    const int64_t first = image * g.out_height * g.out_width * g.channels + channel;
    A sums[kWidth] = {};
    if constexpr (kWindow != kAnyWindow) {
      // Window top / kStride - m has the tap top % kStride + m * kStride there, if it has so many.
      // Taps are read before the first gradient, which most of them do not ask for: all of them, or
      // a row of windows at a time where they are more than the registers hold.
      constexpr int kCovering = (kWindow + kStride - 1) / kStride;
      constexpr int kRows = kCovering > 3 ? 1 : kCovering;
#pragma unroll 1
      for (int last = kCovering - 1; last >= 0; last -= kRows) {
        const int64_t corner =
            first + (int64_t{top / kStride - last} * g.out_width + left / kStride) * g.channels;
        uint32_t won = 0;  // a bit a window
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int y = top / kStride - last + i, r = top % kStride + (last - i) * kStride;
#pragma unroll
          for (int n = 0; n < kCovering; ++n) {
            const int x = left / kStride - n, s = left % kStride + n * kStride;
            const bool covers = r < kWindow && y >= 0 && y < g.out_height &&  //
                                s < kWindow && x >= 0 && x < g.out_width;
            const int64_t window = corner + int64_t{i * g.out_width - n} * g.channels;
            if (covers && argmax[window] == r * kWindow + s) won |= 1u << (i * kCovering + n);
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int n = kCovering - 1; n >= 0; --n) {
            if ((won >> (i * kCovering + n) & 1) != 0) {
              sums[0] +=
                  to_accumulator(grad_output[corner + int64_t{i * g.out_width - n} * g.channels]);
            }
          }
        }
      }
    } else {
      const int extent_h = (g.kernel_height - 1) * g.dilation_h + 1;
      const int extent_w = (g.kernel_width - 1) * g.dilation_w + 1;
      const WindowRange rows = windows_over(top, g.out_height, extent_h, g.stride_h);
      const WindowRange columns = windows_over(left, g.out_width, extent_w, g.stride_w);
      for (int y = rows.begin; y < rows.end; ++y) {
        int r = top - y * g.stride_h;
        if constexpr (kDilated) {
          if (r % g.dilation_h != 0) continue;
          r /= g.dilation_h;
        }
#pragma unroll 2
        for (int x = columns.begin; x < columns.end; ++x) {
          int s = left - x * g.stride_w;
          if constexpr (kDilated) {
            if (s % g.dilation_w != 0) continue;
            s /= g.dilation_w;
          }
          const int64_t window = first + int64_t{y * g.out_width + x} * g.channels;
          const auto taps = load_vector<kWidth>(argmax + window);
          const auto gradients = load_vector<kWidth>(grad_output + window);
#pragma unroll
          for (int v = 0; v < kWidth; ++v) {
            if (static_cast<int>(taps[v]) == r * g.kernel_width + s) {
              sums[v] += to_accumulator(gradients[v]);
            }
          }
        }
      }
    }
    Vector<T, kWidth> values;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) values[v] = from_accumulator<T>(sums[v]);
    const int64_t element =
        (image * g.in_height * g.in_width + position.pixel) * g.channels + channel;
    store_vector<kWidth>(grad_input + element, values);
  }
}

// A tap of window (y, x) as a position y * in_width + x of its plane, or kNoPosition. An argmax may
// come from anywhere: it must not reach memory unchecked.
constexpr int kNoPosition = -1;
__device__ inline int winner_position(const PoolGeometry& g, int pixel, int tap) {
  if (tap < 0 || tap >= g.kernel_height * g.kernel_width) return kNoPosition;
  const int y = pixel / g.out_width * g.stride_h - g.pad_top + tap / g.kernel_width * g.dilation_h;
  const int x = pixel % g.out_width * g.stride_w - g.pad_left + tap % g.kernel_width * g.dilation_w;
  const bool inside = y >= 0 && y < g.in_height && x >= 0 && x < g.in_width;
  return inside ? y * g.in_width + x : kNoPosition;
}

template <class T, class Tap>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    gather_kernel(PoolGeometry g, const T* input, const Tap* argmax, T* values) {
  using A = Accumulator<T>;
  const int no_winner = g.kernel_height * g.kernel_width;
  const auto [first_image, image_step, pixel, channel] = thread_position();
  if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;
  for (int64_t image = first_image; image < g.images; image += image_step) {
    const int64_t window = (image * g.out_height * g.out_width + pixel) * g.channels + channel;
    const int tap = static_cast<int>(argmax[window]);
    const int winner = winner_position(g, pixel, tap);
    if (winner != kNoPosition) {
      values[window] = input[(image * g.in_height * g.in_width + winner) * g.channels + channel];
    } else {
      const A zero = 0;
      values[window] =
          from_accumulator<T>(tap == no_winner ? zero : zero * minus_infinity<A>());  // 0 or NaN
    }
  }
}

template <class Tap>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    indices_kernel(PoolGeometry g, const Tap* argmax, int64_t* indices) {
  const auto [first_image, image_step, pixel, channel] = thread_position();
  if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;
  for (int64_t image = first_image; image < g.images; image += image_step) {
    const int64_t window = (image * g.out_height * g.out_width + pixel) * g.channels + channel;
    indices[window] = winner_position(g, pixel, static_cast<int>(argmax[window]));
  }
}

// Calls body(T, Tap, width), of which the last is an integral constant. Windows of so many taps
// that these take 32 bits come one channel at a time.
template <class Body>
void with_vectors(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, Body&& body) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    with_tap(problem, [&](auto tap) {
      constexpr int kWidest = sizeof(tap) == 1 ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
      if (plan.width == kWidest) {
        body(element, tap, std::integral_constant<int, kWidest>{});
      } else {
        body(element, tap, std::integral_constant<int, 1>{});
      }
    });
  });
}

bool is_dilated(const MaxPool2dProblem& p) { return p.dilation_h > 1 || p.dilation_w > 1; }

// The taps a side of an undilated square window, or kAnyWindow.
int square_window(const MaxPool2dProblem& p) {
  return !is_dilated(p) && p.kernel_height == p.kernel_width ? static_cast<int>(p.kernel_width)
                                                             : kAnyWindow;
}

template <class T, class Tap, int kWidth, bool kArgmax>
auto forward_kernel(const MaxPool2dProblem& problem, bool clips) {
  if (is_dilated(problem)) {
    return windows_forward_kernel<T, Tap, kWidth, kArgmax, kAnyWindow, true>;
  }
  if constexpr (sizeof(Tap) == 1) {
    switch (square_window(problem)) {
      case 2:
        return windows_forward_kernel<T, Tap, kWidth, kArgmax, 2, false>;
      case 3:
        return windows_forward_kernel<T, Tap, kWidth, kArgmax, 3, false>;
      case 5:
        if constexpr (kWidth == 1) {
          if (!clips) return windows_forward_kernel<T, Tap, 1, kArgmax, kClipless, false>;
        }
    }
  }
  return windows_forward_kernel<T, Tap, kWidth, kArgmax, kAnyWindow, false>;
}

template <class T, class Tap, int kWidth>
auto backward_kernel(const MaxPool2dProblem& problem) {
  if (is_dilated(problem)) return windows_backward_kernel<T, Tap, kWidth, kAnyWindow, 1, true>;
  if constexpr (sizeof(Tap) == 1 && kWidth == 1) {  // vectors of all taps are too many registers
    const int window = square_window(problem);
    const auto has_stride = [&](int64_t s) {
      return problem.stride_h == s && problem.stride_w == s;
    };
    if (window == 2 && has_stride(2)) return windows_backward_kernel<T, Tap, 1, 2, 2, false>;
    if (window == 3 && has_stride(2)) return windows_backward_kernel<T, Tap, 1, 3, 2, false>;
    if (window == 3 && has_stride(1)) return windows_backward_kernel<T, Tap, 1, 3, 1, false>;
    if (window == 5 && has_stride(1)) return windows_backward_kernel<T, Tap, 1, 5, 1, false>;
  }
  return windows_backward_kernel<T, Tap, kWidth, kAnyWindow, 1, false>;
}

}  // namespace

Error windows_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const void* input,
                      void* output, void* argmax, bool clips, Stream stream) {
  Error error = kSuccess;
  with_vectors(problem, plan, [&](auto element, auto tap, auto width) {
    using T = decltype(element);
    using Tap = decltype(tap);
    constexpr int kWidth = decltype(width)::value;
    const auto pool = argmax != nullptr ? forward_kernel<T, Tap, kWidth, true>(problem, clips)
                                        : forward_kernel<T, Tap, kWidth, false>(problem, clips);
    error =
        launch(pool, plan.forward, 0, stream, PoolGeometry(problem, clips),
               static_cast<const T*>(input), static_cast<T*>(output), static_cast<Tap*>(argmax));
  });
  return error;
}

Error windows_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                       const void* grad_output, const void* argmax, void* grad_input,
                       Stream stream) {
  Error error = kSuccess;
  with_vectors(problem, plan, [&](auto element, auto tap, auto width) {
    using T = decltype(element);
    using Tap = decltype(tap);
    error = launch(backward_kernel<T, Tap, decltype(width)::value>(problem), plan.backward, 0,
                   stream, PoolGeometry(problem), static_cast<const T*>(grad_output),
                   static_cast<const Tap*>(argmax), static_cast<T*>(grad_input));
  });
  return error;
}

Error max_pool2d_gather(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                        const void* input, const void* argmax, void* values, Stream stream) {
  Error error = kSuccess;
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    with_tap(problem, [&](auto tap) {
      using Tap = decltype(tap);
      error = launch(gather_kernel<T, Tap>, plan.each_window, 0, stream, PoolGeometry(problem),
                     static_cast<const T*>(input), static_cast<const Tap*>(argmax),
                     static_cast<T*>(values));
    });
  });
  return error;
}

Error max_pool2d_indices(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                         const void* argmax, int64_t* indices, Stream stream) {
  Error error = kSuccess;
  with_tap(problem, [&](auto tap) {
    using Tap = decltype(tap);
    error = launch(indices_kernel<Tap>, plan.each_window, 0, stream, PoolGeometry(problem),
                   static_cast<const Tap*>(argmax), indices);
  });
  return error;
}

}  // namespace cnnkernels::cuda
