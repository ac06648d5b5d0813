// Vectors of the tier's width, as compiler vector extensions: one source for
// SSE, AVX2, AVX-512 and, through the baseline, NEON. Included once a tier.

#define CNNK_INLINE inline __attribute__((always_inline))

template <int Value>
using Constant = std::integral_constant<int, Value>;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(CNNK_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = CNNK_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Products are summed in chains of about this many, in long sums of more (chain_length), and
// the chains then added up: the rounding error of a float sum grows with the length of its
// chain. The baseline also rounds each product.
constexpr int64_t kSumLength = CNNK_VECTOR_BYTES > 16 ? 32 : 16;

// The integer as wide as T, of which comparisons of Vec<T> are made.
template <class T>
struct MaskElement {
  using type = int32_t;
};
template <>
struct MaskElement<double> {
  using type = int64_t;
};
template <class T>
using Mask = typename MaskElement<T>::type;

template <class T>
CNNK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
CNNK_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
CNNK_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // value - 0 keeps -0.0, which value + 0 does not
}

template <class T>
CNNK_INLINE Vec<T> select(Vec<Mask<T>> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

template <class T>
CNNK_INLINE Vec<T> relu(Vec<T> value) {
  return select<T>(value <= Vec<T>{}, Vec<T>{}, value);  // NaN passes
}

template <class T>
CNNK_INLINE Vec<T> relu_if(bool wanted, Vec<T> value) {
  return wanted ? relu<T>(value) : value;
}

template <class T>
CNNK_INLINE Vec<T> lane_numbers() {
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<T>(i);
  return load(lanes);
}

// All ones in the first n lanes.
template <class T>
CNNK_INLINE Vec<Mask<T>> first_lanes(int64_t n) {
  return lane_numbers<Mask<T>>() < broadcast<Mask<T>>(static_cast<Mask<T>>(n));
}

// The lanes of two vectors that At(0), At(1), ... name, the second's from kLanes on.
template <class T, int (*At)(int), size_t... I>
CNNK_INLINE Vec<T> shuffled(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, At(I)...);
#else
  return __builtin_shuffle(a, b, Vec<Mask<T>>{At(I)...});
#endif
}
template <class T, int (*At)(int)>
CNNK_INLINE Vec<T> shuffled(Vec<T> a, Vec<T> b) {
  return shuffled<T, At>(a, b, std::make_index_sequence<kLanes<T>>());
}

// By halves: lane i and lane i + width, until one is left.
template <int Width>
constexpr int lane_above(int i) {
  return (i + Width) % (2 * Width);
}
template <class T, int Width = kLanes<T> / 2>
CNNK_INLINE T sum_lanes(Vec<T> v) {
  v += shuffled<T, lane_above<Width>>(v, v);
  if constexpr (Width == 1) {
    return v[0];
  } else {
    return sum_lanes<T, Width / 2>(v);
  }
}

// Becomes NaN where a value is not finite.
CNNK_INLINE void mark(Vec<float>& marks, Vec<float> v) { marks += v * 0.0f; }

CNNK_INLINE bool all_finite(Vec<float> marks) { return sum_lanes<float>(marks) == 0.0f; }

// Conversions between storage and accumulator, a vector of accumulators at a
// time.

CNNK_INLINE Vec<float> load_widened(const float* p) { return load(p); }
CNNK_INLINE Vec<double> load_widened(const double* p) { return load(p); }

CNNK_INLINE Vec<float> load_widened(const bfloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(CNNK_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(CNNK_VECTOR_BYTES)));
  Narrow narrow_bits;
  __builtin_memcpy(&narrow_bits, p, sizeof narrow_bits);
  return (Vec<float>)(__builtin_convertvector(narrow_bits, Wide) << 16);
}

CNNK_INLINE Vec<float> load_widened(const float16* p) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif CNNK_TIER_ID == 1
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

CNNK_INLINE void store_narrowed(float* p, Vec<float> v) { store(p, v); }
CNNK_INLINE void store_narrowed(double* p, Vec<double> v) { store(p, v); }

CNNK_INLINE void store_narrowed(bfloat16* p, Vec<float> v) {
  typedef uint16_t Narrow __attribute__((vector_size(CNNK_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(CNNK_VECTOR_BYTES)));
  const Wide bits = (Wide)v;
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide nan = Wide{} + 0x7fc0u;
  const Narrow narrow_bits = __builtin_convertvector(v != v ? nan : rounded, Narrow);
  __builtin_memcpy(p, &narrow_bits, sizeof narrow_bits);
}

CNNK_INLINE void store_narrowed(float16* p, Vec<float> v) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif CNNK_TIER_ID == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<float16>(v[i]);
#endif
}

template <class T>
CNNK_INLINE bool all_finite(const T* values, int64_t count) {
  using A = Accumulator<T>;
  Vec<A> marks{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) marks += load_widened(values + i) * A{0};
  A rest = sum_lanes<A>(marks);
  for (; i < count; ++i) rest += widen(values[i]) * A{0};
  return rest == A{0};
}

// The first n < lanes elements; the other lanes read as `fill`.
template <class T>
CNNK_INLINE Vec<Accumulator<T>> load_first(const T* p, int64_t n, Accumulator<T> fill) {
  Accumulator<T> lanes[kLanes<Accumulator<T>>];
  store(lanes, broadcast<Accumulator<T>>(fill));
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}

// The same with zeros, without reading what follows.
template <class T>
CNNK_INLINE Vec<Accumulator<T>> load_head(const T* p, int64_t n) {
  return load_first(p, n, Accumulator<T>{0});
}
CNNK_INLINE Vec<float> load_head(const float* p, int64_t n) {
#if CNNK_TIER_ID == 1
  return (Vec<float>)_mm256_maskload_ps(p, (__m256i)first_lanes<float>(n));
#elif CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  return load_first(p, n, 0.0f);
#endif
}

template <class T>
CNNK_INLINE void store_first(T* p, Vec<Accumulator<T>> v, int64_t n, int64_t step = 1) {
  Accumulator<T> lanes[kLanes<Accumulator<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i * step] = narrow<T>(lanes[i]);
}

// The element types that accumulate in A, resolved at run time where a branch a
// vector costs less than another copy of the kernel.
template <class A, class Body>
CNNK_INLINE void with_storage(DType dtype, Body&& body) {
  if constexpr (std::is_same_v<A, double>) {
    body(double{});
  } else if (dtype == DType::float32) {
    body(float{});
  } else if (dtype == DType::bfloat16) {
    body(bfloat16{});
  } else {
    body(float16{});
  }
}

// The values as `dtype` holds them.
template <class A>
CNNK_INLINE Vec<A> rounded(DType dtype, Vec<A> v) {
  if (std::is_same_v<A, double> || dtype == DType::float32) return v;
  with_storage<A>(dtype, [&](auto element) {
    decltype(element) values[kLanes<A>];
    store_narrowed(values, v);
    v = load_widened(values);
  });
  return v;
}

// The first n < lanes lanes, without touching what follows.
CNNK_INLINE void store_head(float* p, Vec<float> v, int64_t n) {
#if CNNK_TIER_ID == 1
  _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(n), (__m256)v);
#elif CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  store_first(p, v, n);
#endif
}
template <class T>
CNNK_INLINE void store_head(T* p, Vec<Accumulator<T>> v, int64_t n) {
  store_first(p, v, n);
}

// Converts `count` consecutive elements.
template <class T>
CNNK_INLINE void widen_row(const T* from, Accumulator<T>* to, int64_t count) {
  constexpr int lanes = kLanes<Accumulator<T>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load_widened(from + i));
  if (i < count) store_head(to + i, load_head(from + i, count - i), count - i);
}

template <class T>
CNNK_INLINE void narrow_row(const Accumulator<T>* from, T* to, int64_t count) {
  constexpr int lanes = kLanes<Accumulator<T>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_narrowed(to + i, load(from + i));
  if (i < count) store_head(to + i, load_head(from + i, count - i), count - i);
}

// Stores the first `count` lanes from element `at` on, `step` elements apart.
template <class A>
__attribute__((noinline)) void store_as(DType dtype, void* out, int64_t at, Vec<A> v, int64_t count,
                                        int64_t step) {
  with_storage<A>(dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = static_cast<T*>(out) + at;
    if (step == 1 && count == kLanes<A>) {
      store_narrowed(to, v);
    } else {
      store_first(to, v, count, step);
    }
  });
}

// The same, with the common case in line: a row of accumulators.
template <class A>
CNNK_INLINE void store_out(DType dtype, void* out, int64_t at, Vec<A> v, int64_t count,
                           int64_t step) {
  const bool plain = step == 1 && (std::is_same_v<A, double> || dtype == DType::float32);
  if (!plain) return store_as<A>(dtype, out, at, v, count, step);
  A* const to = static_cast<A*>(out) + at;
  if (count == kLanes<A>) {
    store(to, v);
  } else {
    store_head(to, v, count);
  }
}

constexpr int even_lane(int i) { return 2 * i; }
constexpr int odd_lane(int i) { return 2 * i + 1; }
template <int Lanes>
constexpr int low_lane(int i) {
  return i % 2 * Lanes + i / 2;
}
template <int Lanes>
constexpr int high_lane(int i) {
  return low_lane<Lanes>(i + Lanes);
}

// Every second element of the 2 * lanes from p on: the even ones and the odd.
template <class T>
struct EvenOdd {
  Vec<T> even, odd;
};
template <class T>
CNNK_INLINE EvenOdd<T> load_even_odd(const T* p) {
  const Vec<T> low = load(p), high = load(p + kLanes<T>);
  return {shuffled<T, even_lane>(low, high), shuffled<T, odd_lane>(low, high)};
}

// The inverse: the elements of which `even` and `odd` are every second.
template <class T>
struct LowHigh {
  Vec<T> low, high;
};
template <class T>
CNNK_INLINE LowHigh<T> interleaved(Vec<T> even, Vec<T> odd) {
  return {shuffled<T, low_lane<kLanes<T>>>(even, odd),
          shuffled<T, high_lane<kLanes<T>>>(even, odd)};
}
