// Floats as sums of one, two or three bfloat16.
//
// Cutting a float's mantissa into pieces of eight bits gives three parts that are
// exact together: the first is the number without its low 16 bits, the second the same
// of what is left. Cutting, unlike rounding, never overflows. The last of fewer than
// three parts is rounded to nearest, for what is left is lost. bfloat16 is one part
// and float16 is two, exactly.
//
// Infinity and NaN have no such parts, but of bfloat16: infinity times a part that is zero
// would be NaN, and rounding makes a number of some NaN.
// What makes parts therefore also says whether all was finite.

// Nor do very small numbers: their lesser parts, and the products of these, are below
// the smallest float, and tiles take those for zero. So the largest magnitudes of
// operands and results are kept, and tell whether what was lost matters in norm.

typedef uint32_t Words __attribute__((vector_size(CNNK_VECTOR_BYTES)));

// The next part of v, in the high halves of words; v becomes what is left. Where it is
// rounded and may be large, it is the largest bfloat16 rather than infinite.
template <bool Round, bool Large>
CNNK_INLINE Words next_part(Vec<float>& v) {
  if (Round && Large) {
    const Vec<float> most = broadcast(0x1.fep127f);
    v = select<float>(v > most, most, select<float>(v < -most, -most, v));
  }
  Words bits = (Words)v;
  if (Round) bits += 0x7fffu + ((bits >> 16) & 1u);
  bits &= 0xffff0000u;
  v -= (Vec<float>)bits;
  return bits;
}

template <class T, int Parts>
constexpr bool kRoundsLast = std::is_same_v<T, float> && Parts < 3;

// The 32 values of a and then b: `to`[part * part_step + i].
template <class T, int Parts>
CNNK_INLINE void store_parts(Vec<float> a, Vec<float> b, uint16_t* to, int64_t part_step) {
  typedef uint16_t Halves __attribute__((vector_size(CNNK_VECTOR_BYTES)));
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    const bool last = part == Parts - 1;
    const Words first =
        last ? next_part<kRoundsLast<T, Parts>, Parts == 1>(a) : next_part<false, false>(a);
    const Words second =
        last ? next_part<kRoundsLast<T, Parts>, Parts == 1>(b) : next_part<false, false>(b);
#if defined(__clang__)
    const Halves packed = __builtin_shufflevector(
        (Halves)first, (Halves)second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#else
    const Halves packed =
        __builtin_shuffle((Halves)first, (Halves)second,
                          Halves{1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63});
#endif
    __builtin_memcpy(to + part * part_step, &packed, sizeof packed);
  }
}

// The 16 pairs (even[i], odd[i]): `to`[part * part_step + 2 * i].
template <class T, int Parts>
CNNK_INLINE void store_pairs(Vec<float> even, Vec<float> odd, uint16_t* to, int64_t part_step) {
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    const bool last = part == Parts - 1;
    const Words first =
        last ? next_part<kRoundsLast<T, Parts>, Parts == 1>(even) : next_part<false, false>(even);
    const Words second =
        last ? next_part<kRoundsLast<T, Parts>, Parts == 1>(odd) : next_part<false, false>(odd);
    const Words pairs = (first >> 16) | second;
    __builtin_memcpy(to + part * part_step, &pairs, sizeof pairs);
  }
}

// The largest magnitudes, lane by lane, as bits: they compare as integers, and infinity
// and NaN are larger than all.
typedef Vec<int32_t> Largest;

CNNK_INLINE void mark(Largest& largest, Vec<float> v) {
  const Vec<int32_t> bits = (Vec<int32_t>)v & 0x7fffffff;
  largest = bits > largest ? bits : largest;
}

// Those of a call's operands and results, of all threads.
class Magnitudes {
 public:
  void add_source(Largest largest) { add(source_, largest); }
  void add_weights(Largest largest) { add(weights_, largest); }
  void add_result(Largest largest) { add(result_, largest); }

  bool finite() const {
    constexpr int32_t kInfinity = 0x7f800000;
    return source_.load(std::memory_order_relaxed) < kInfinity &&
           weights_.load(std::memory_order_relaxed) < kInfinity;
  }
  // Whether parts and their products, down to 2^-24 of these, were normal numbers.
  bool exact() const {
    constexpr int32_t kLeastOperand = (127 - 100) << 23, kLeastResult = (127 - 90) << 23;
    const int32_t source = source_.load(std::memory_order_relaxed);
    const int32_t weights = weights_.load(std::memory_order_relaxed);
    if (!finite()) return false;
    if (source == 0 || weights == 0) return true;
    return source >= kLeastOperand && weights >= kLeastOperand &&
           result_.load(std::memory_order_relaxed) >= kLeastResult;
  }

 private:
  static void add(std::atomic<int32_t>& to, Largest largest) {
    int32_t most = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) most = std::max(most, int32_t{largest[lane]});
    int32_t before = to.load(std::memory_order_relaxed);
    while (before < most && !to.compare_exchange_weak(before, most, std::memory_order_relaxed)) {
    }
  }

  std::atomic<int32_t> source_{0}, weights_{0}, result_{0};
};
