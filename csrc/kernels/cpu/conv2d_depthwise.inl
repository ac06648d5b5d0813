// Depthwise convolution in both layouts.

#include "kernels/cpu/outer_product_tile.inl"

// Calls body(first, Constant<P>) for tiles of 8, 4, 2 and 1 that cover [begin, end).
template <class Body>
CNNK_INLINE void for_each_pixel_tile(int64_t begin, int64_t end, Body&& body) {
  int64_t j = begin;
  for (; end - j >= 8; j += 8) body(j, Constant<8>{});
  for (; end - j >= 4; j += 4) body(j, Constant<4>{});
  for (; end - j >= 2; j += 2) body(j, Constant<2>{});
  for (; end - j >= 1; j += 1) body(j, Constant<1>{});
}

// Calls body(first, Constant<N>) for tiles of 9, 3 and 1 taps: sums of 9 taps,
// those of a 3x3 kernel, and their operands fill 16 registers well.
template <class Body>
CNNK_INLINE void for_each_tap_tile(int64_t taps, Body&& body) {
  int64_t t = 0;
  for (; taps - t >= 9; t += 9) body(t, Constant<9>{});
  for (; taps - t >= 3; t += 3) body(t, Constant<3>{});
  for (; taps - t >= 1; t += 1) body(t, Constant<1>{});
}

// The weight of (output channel, input channel of its group, r, s), widened.
template <class T>
CNNK_INLINE Accumulator<T> weight_at(const Conv2dProblem& problem, const void* weight, int64_t k,
                                     int64_t c, int64_t r, int64_t s) {
  return widen(
      static_cast<const T*>(weight)[k * problem.weight_stride_k + c * problem.weight_stride_c +
                                    r * problem.weight_stride_r + s * problem.weight_stride_s]);
}

// A tap of a row or a plane, row and column resolved: where its source starts and
// the number of its weight, r * kernel_width + s.
template <class Source>
struct PlaneTap {
  const Source* source;
  int64_t weight;
  int64_t begin, end;  // destination columns
};

#include "kernels/cpu/conv2d_depthwise_interleaved.inl"
#include "kernels/cpu/conv2d_depthwise_nchw.inl"
