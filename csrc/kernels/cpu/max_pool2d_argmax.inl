// Vectors and short runs of argmaxes: bytes, or int32 where windows are large.

// A vector of taps, widened to the masks' integers. GCC converts bytes in two
// halves, and one by one where the integers are more than twice as wide.
template <class A>
CNNK_INLINE Vec<Mask<A>> load_taps(const int32_t* p) {
  typedef int32_t Taps __attribute__((vector_size(kLanes<A> * sizeof(int32_t))));
  Taps taps;
  __builtin_memcpy(&taps, p, sizeof taps);
  return __builtin_convertvector(taps, Vec<Mask<A>>);
}
template <class A>
CNNK_INLINE Vec<Mask<A>> load_taps(const uint8_t* p) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if constexpr (std::is_same_v<A, double>)
    return (Vec<Mask<A>>)_mm512_cvtepu8_epi64(_mm_loadu_si64(p));
  return (Vec<Mask<A>>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif CNNK_TIER_ID == 1
  if constexpr (std::is_same_v<A, double>)
    return (Vec<Mask<A>>)_mm256_cvtepu8_epi64(_mm_loadu_si32(p));
  return (Vec<Mask<A>>)_mm256_cvtepu8_epi32(_mm_loadu_si64(p));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<Mask<A>>);
#endif
}

// The first n < lanes taps, without reading what follows.
template <class A, class Tap>
CNNK_INLINE Vec<Mask<A>> load_taps_head(const Tap* p, int64_t n) {
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<Tap, uint8_t>) {
    return (Vec<Mask<A>>)_mm512_cvtepu8_epi32(
        _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p));
  }
#endif
  Tap taps[kLanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) taps[i] = p[i];
  return load_taps<A>(taps);
}

// Short runs of taps, without a call and without touching what follows: the last
// eight bytes are moved back to end with the run.
template <class Tap>
CNNK_INLINE void copy_taps(const Tap* from, Tap* to, int64_t count) {
  constexpr int64_t piece = 8 / static_cast<int64_t>(sizeof(Tap));
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if (sizeof(Tap) == 1 && count <= 16) {
    const __mmask16 run = static_cast<__mmask16>((1u << count) - 1);
    _mm_mask_storeu_epi8(to, run, _mm_maskz_loadu_epi8(run, from));
    return;
  }
#endif
  if (count < piece) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < count; i += piece) {
    const int64_t at = std::min(i, count - piece);
    __builtin_memcpy(to + at, from + at, 8);
  }
}

// Whether a comparison holds in any lane.
template <class Lanes>
CNNK_INLINE bool any(Lanes lanes) {
  int64_t words[sizeof lanes / sizeof(int64_t)];
  __builtin_memcpy(words, &lanes, sizeof lanes);
  int64_t all = 0;
  for (const int64_t word : words) all |= word;
  return all != 0;
}
