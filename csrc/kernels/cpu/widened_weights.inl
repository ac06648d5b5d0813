// Parameters in the accumulator type.

// Whether elements of `dtype` need widening to be multiplied.
CNNK_INLINE bool widens(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }

// A bias: where it lies if it is of the accumulator type, else widened into
// `scratch`; null stays null.
template <class A>
const A* widened_bias(DType dtype, const void* bias, int64_t count, A* scratch) {
  if (bias == nullptr || !widens(dtype)) return static_cast<const A*>(bias);
  with_storage<A>(dtype, [&](auto element) {
    widen_row(static_cast<const decltype(element)*>(bias), scratch, count);
  });
  return scratch;
}

// Weights, with the strides that go with them.
template <class A>
struct WidenedWeights {
  const A* data;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

inline int64_t weight_count(const Conv2dProblem& problem) {
  return problem.out_channels * (problem.in_channels / problem.groups) * problem.kernel_height *
         problem.kernel_width;
}

template <class A>
WidenedWeights<A> widened_weights(const Conv2dProblem& problem, const void* weight, A* scratch) {
  if (!widens(problem.dtype)) {
    return {static_cast<const A*>(weight), problem.weight_stride_k, problem.weight_stride_c,
            problem.weight_stride_r, problem.weight_stride_s};
  }
  const int64_t in_channels = problem.in_channels / problem.groups;
  const int64_t taps = problem.kernel_height * problem.kernel_width;
  with_storage<A>(problem.dtype, [&](auto element) {
    A* to = scratch;
    for (int64_t k = 0; k < problem.out_channels; ++k) {
      for (int64_t c = 0; c < in_channels; ++c) {
        for (int64_t r = 0; r < problem.kernel_height; ++r) {
          const auto* const from = static_cast<const decltype(element)*>(weight) +
                                   k * problem.weight_stride_k + c * problem.weight_stride_c +
                                   r * problem.weight_stride_r;
          for (int64_t s = 0; s < problem.kernel_width; ++s) {
            *to++ = widen(from[s * problem.weight_stride_s]);
          }
        }
      }
    }
  });
  return {scratch, in_channels * taps, taps, problem.kernel_width, 1};
}
