// Pooling of 2x2 and 3x3 windows at stride 2 in NCHW: the poolings of most networks.
//
// Memory is the limit: forward five bytes an output beyond the input's, in float. A thread takes a
// strip of windows of a row, two of float or four of 16 bits: the columns below it are one access
// of 16 bytes, which lies beside those of the threads beside it. Where windows overlap it reads one
// column of a neighbour too, on the left with padding and on the right without: that line is in the
// first-level cache. Padding is -inf, which is never greater and so never wins.
//
// The backward is a gather: a thread takes the two rows of gradients below a strip, reads the
// windows that cover them, of which there are at most two a direction, and takes from each what its
// argmax says. All taps are known to the compiler; every element is written once, in vectors, and
// has its windows added in torch's order.
#include <type_traits>

#include "kernels/cuda/max_pool2d_device.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kStride = 2;

// The columns below a strip with those of its neighbours, and which of them a tap of a window is.
template <int kKernel, int kPad, int kWidth>
struct StripColumns {
  static constexpr int kOwn = kStride * kWidth;
  static constexpr int kHalo = kKernel - kStride;  // of one neighbour
  // Where the halo lies, relative to the first own column.
  static constexpr int kHaloColumn = kPad > 0 ? -1 : kOwn;
};

template <class T, int kKernel, int kPad, int kWidth, bool kArgmax>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    strips_forward_kernel(PoolGeometry g, const T* input, T* output, uint8_t* argmax) {
  using A = Accumulator<T>;
  using Columns = StripColumns<kKernel, kPad, kWidth>;
  const int strips = g.out_width / kWidth;
  const Position position = thread_position();
  const int y = position.pixel / strips;
  const int x = position.pixel % strips * kWidth;
  if (y >= g.out_height) return;
  for (int64_t image = position.image; image < g.images; image += position.image_step) {
    const T* const plane = input + image * g.in_height * g.in_width;
    Winner<A> winners[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      // A window of -inf alone has its first element inside of the image for a winner.
      const int first_row = kPad > 0 && y == 0 ? 1 : 0;
      const int first_column = kPad > 0 && x + v == 0 ? 1 : 0;
      winners[v] = {minus_infinity<A>(), first_row * kKernel + first_column};
    }
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
      const int row = y * kStride - kPad + r;
      if (row < 0 || row >= g.in_height) continue;
      const T* const own = plane + row * g.in_width + x * kStride;
      const auto vector = load_vector<Columns::kOwn>(own);
      A halo = minus_infinity<A>();
      const int halo_column = x * kStride + Columns::kHaloColumn;
      if (Columns::kHalo > 0 && halo_column >= 0 && halo_column < g.in_width) {
        halo = to_accumulator(own[Columns::kHaloColumn]);
      }
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
#pragma unroll
        for (int s = 0; s < kKernel; ++s) {
          const int column = v * kStride - kPad + s;
          const bool is_own = column >= 0 && column < Columns::kOwn;
          winners[v].challenge(is_own ? to_accumulator(vector[is_own ? column : 0]) : halo,
                               r * kKernel + s);
        }
      }
    }
    const int64_t first = (image * g.out_height + y) * g.out_width + x;
    Vector<T, kWidth> values;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) values[v] = from_accumulator<T>(winners[v].value);
    store_vector<kWidth>(output + first, values);
    if constexpr (kArgmax) {
      Vector<uint8_t, kWidth> taps;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) taps[v] = static_cast<uint8_t>(saved_tap(g, winners[v]));
      store_vector<kWidth>(argmax + first, taps);
    }
  }
}

// Windows over a row or a column of the input: window `own + d` covers the element a of its own
// pair of rows by tap a + kPad - kStride * d, for d of [kFirst, kFirst + kCount).
template <int kKernel, int kPad>
struct CoveringWindows {
  static constexpr int kCount = kKernel == 3 ? 2 : 1;
  static constexpr int kFirst = kKernel == 3 && kPad == 0 ? -1 : 0;
};

template <class T, int kKernel, int kPad, int kWidth>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    strips_backward_kernel(PoolGeometry g, const T* grad_output, const uint8_t* argmax,
                           T* grad_input) {
  using A = Accumulator<T>;
  using Covering = CoveringWindows<kKernel, kPad>;
  constexpr int kOwn = kStride * kWidth;
  constexpr int kWindows = kWidth + Covering::kCount - 1;
  constexpr int kNoTap = 255;
  const int strips = g.out_width / kWidth;
  const int pairs = (g.in_height + 1) / kStride;
  const Position position = thread_position();
  const int pair = position.pixel / strips;
  const int x = position.pixel % strips * kWidth;
  if (pair >= pairs) return;
  for (int64_t image = position.image; image < g.images; image += position.image_step) {
    A gradients[Covering::kCount][kWindows];
    int taps[Covering::kCount][kWindows];
#pragma unroll
    for (int d = 0; d < Covering::kCount; ++d) {
#pragma unroll
      for (int v = 0; v < kWindows; ++v) {
        gradients[d][v] = 0;
        taps[d][v] = kNoTap;
      }
      const int y = pair + Covering::kFirst + d;
      if (y < 0 || y >= g.out_height) continue;
      const int64_t first = (image * g.out_height + y) * g.out_width + x;
      const auto own_gradients = load_vector<kWidth>(grad_output + first);
      const auto own_taps = load_vector<kWidth>(argmax + first);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        gradients[d][v - Covering::kFirst] = to_accumulator(own_gradients[v]);
        taps[d][v - Covering::kFirst] = own_taps[v];
      }
      if constexpr (Covering::kCount > 1) {
        constexpr int kNeighbour = Covering::kFirst < 0 ? -1 : kWidth;
        if (x + kNeighbour >= 0 && x + kNeighbour < g.out_width) {
          gradients[d][kNeighbour - Covering::kFirst] =
              to_accumulator(grad_output[first + kNeighbour]);
          taps[d][kNeighbour - Covering::kFirst] = argmax[first + kNeighbour];
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kStride; ++a) {
      const int row = pair * kStride + a;
      if (row >= g.in_height) break;
      Vector<T, kOwn> sums;
#pragma unroll
      for (int b = 0; b < kOwn; ++b) {
        A sum = 0;
#pragma unroll
        for (int d = 0; d < Covering::kCount; ++d) {
#pragma unroll
          for (int e = 0; e < Covering::kCount; ++e) {
            const int r = a + kPad - kStride * (Covering::kFirst + d);
            const int s = b % kStride + kPad - kStride * (Covering::kFirst + e);
            if (r < 0 || r >= kKernel || s < 0 || s >= kKernel) continue;
            const int window = b / kStride + e;
            if (taps[d][window] == r * kKernel + s) sum += gradients[d][window];
          }
        }
        sums[b] = from_accumulator<T>(sum);
      }
      store_vector<kOwn>(grad_input + (image * g.in_height + row) * g.in_width + x * kStride, sums);
    }
  }
}

// Calls body(T, kernel, padding, width), of which the last three are integral constants.
template <class Body>
void with_strips(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, Body&& body) {
  const auto with_width = [&](auto element, auto kernel, auto pad) {
    constexpr int kWidest = widest_strip(sizeof element);
    if (plan.width == kWidest) {
      body(element, kernel, pad, std::integral_constant<int, kWidest>{});
    } else if constexpr (kWidest > 1) {
      if (plan.width == kWidest / 2) {
        body(element, kernel, pad, std::integral_constant<int, kWidest / 2>{});
      } else if constexpr (kWidest > 2) {
        body(element, kernel, pad, std::integral_constant<int, kWidest / 4>{});
      }
    }
  };
  with_dtype(problem.dtype, [&](auto element) {
    using Two = std::integral_constant<int, 2>;
    using Three = std::integral_constant<int, 3>;
    if (problem.kernel_width == 2) {
      with_width(element, Two{}, std::integral_constant<int, 0>{});
    } else if (problem.pad_left == 0) {
      with_width(element, Three{}, std::integral_constant<int, 0>{});
    } else {
      with_width(element, Three{}, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

Error strips_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const void* input,
                     void* output, void* argmax, bool clips, Stream stream) {
  Error error = kSuccess;
  with_strips(problem, plan, [&](auto element, auto kernel, auto pad, auto width) {
    using T = decltype(element);
    constexpr int kKernel = decltype(kernel)::value;
    constexpr int kPad = decltype(pad)::value;
    constexpr int kWidth = decltype(width)::value;
    const auto pool = argmax != nullptr ? strips_forward_kernel<T, kKernel, kPad, kWidth, true>
                                        : strips_forward_kernel<T, kKernel, kPad, kWidth, false>;
    error = launch(pool, plan.forward, 0, stream, PoolGeometry(problem, clips),
                   static_cast<const T*>(input), static_cast<T*>(output),
                   static_cast<uint8_t*>(argmax));
  });
  return error;
}

Error strips_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                      const void* grad_output, const void* argmax, void* grad_input,
                      Stream stream) {
  Error error = kSuccess;
  with_strips(problem, plan, [&](auto element, auto kernel, auto pad, auto width) {
    using T = decltype(element);
    error =
        launch(strips_backward_kernel<T, decltype(kernel)::value, decltype(pad)::value,
                                      decltype(width)::value>,
               plan.backward, 0, stream, PoolGeometry(problem), static_cast<const T*>(grad_output),
               static_cast<const uint8_t*>(argmax), static_cast<T*>(grad_input));
  });
  return error;
}

}  // namespace cnnkernels::cuda
