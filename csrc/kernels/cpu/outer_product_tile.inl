// The register tile of outer-product convolution.
//
// KV vectors of output channels by P output pixels live in registers. A step
// loads KV vectors of weights and broadcasts P source elements for KV*P
// multiply-adds. Pixels need not be neighbours, so rows of any width fill the
// tile, and a source element is read where it lies: neither layout nor stride
// asks for packing. 1x8, 2x6 and 3x4 are what 16 registers hold beside their
// operands, 3x8 and 4x6 what 32 do; the pointers to more than 8 pixels would not fit.

template <int KV>
constexpr int kTilePixels = CNNK_VECTOR_REGISTERS >= 32 ? (KV == 4 ? 6 : 8)
                            : KV == 1                   ? 8
                            : KV == 2                   ? 6
                                                        : 4;

// The vectors of the commonest tile.
constexpr int kTileVectors = CNNK_VECTOR_REGISTERS >= 32 ? 4 : 2;

// Products in one chain of a sum of `count`: the longer the sum, the longer the chain whose
// error does not show beside the sum's.
constexpr int64_t chain_length(int64_t count) {
  return kSumLength * (count >= 1024 ? 4 : count >= 256 ? 2 : 1);
}

// A sequence of steps: element offsets of the source, the same for all pixels,
// and vectors of channels that they are multiplied by.
template <class A>
struct OuterProductSteps {
  const int64_t* offsets;
  int64_t count;
  const A* panels;  // [vector][step][lane]
  int64_t panel;    // from one vector of channels to the next
  int64_t step;     // from one step to the next
};

// Cache lines to fetch, one after the other. A tile takes one a step: many at once would wait
// for one another, and the tile for them.
struct FetchedLines {
  const char* first;
  int64_t count;
  int64_t step = 64;  // bytes from one to the next

  CNNK_INLINE void fetch_next() {
    if (count <= 0) return;
    __builtin_prefetch(first, 0, 2);
    first += step;
    --count;
  }
};

// sum[p][v] = the products of steps [begin, end).
template <bool Fetches, class A, int KV, int P>
CNNK_INLINE void outer_product_sum(const A* const (&source)[P], const OuterProductSteps<A>& steps,
                                   int64_t first_vector, int64_t begin, int64_t end,
                                   Vec<A> (&sum)[P][KV], FetchedLines& lines) {
  const A* const panels = steps.panels + first_vector * steps.panel;
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v) sum[p][v] = Vec<A>{};
  }
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (Fetches) lines.fetch_next();
    const int64_t offset = steps.offsets[i];
    Vec<A> weight[KV];
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v) weight[v] = load(panels + v * steps.panel + i * steps.step);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const Vec<A> x = broadcast(source[p][offset]);
#pragma GCC unroll 4
      for (int v = 0; v < KV; ++v) sum[p][v] += weight[v] * x;
    }
  }
}

// total[p][v] = the products of all steps, summed in chains. May fetch lines meanwhile.
template <bool Fetches = false, class A, int KV, int P>
CNNK_INLINE void outer_product_tile(const A* const (&source)[P], const OuterProductSteps<A>& steps,
                                    int64_t first_vector, Vec<A> (&total)[P][KV],
                                    FetchedLines lines = {nullptr, 0}) {
  const int64_t chain = chain_length(steps.count);
  if (steps.count <= chain) {
    outer_product_sum<Fetches>(source, steps, first_vector, 0, steps.count, total, lines);
    return;
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v) total[p][v] = Vec<A>{};
  }
  for (int64_t begin = 0; begin < steps.count; begin += chain) {
    Vec<A> sum[P][KV];
    outer_product_sum<Fetches>(source, steps, first_vector, begin,
                               std::min(steps.count, begin + chain), sum, lines);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < KV; ++v) total[p][v] += sum[p][v];
    }
  }
}

// Calls body(first vector, Constant<KV>) for tiles that cover `vectors`: tiles of one more or
// one less than Widest, until those that are left are a multiple of it; so none is of one
// vector, unless there is but one.
template <int Widest = kTileVectors, class Body>
CNNK_INLINE void for_each_vector_tile(int64_t vectors, Body&& body) {
  constexpr int other = Widest == 2 ? 3 : Widest - 1;
  for (int64_t v = 0, left = vectors; left > 0; left = vectors - v) {
    if (left == 1) {
      body(v, Constant<1>{});
      return;
    }
    if (left == 2) {
      body(v, Constant<2>{});
      return;
    }
    if (left % Widest == 0) {
      body(v, Constant<Widest>{});
      v += Widest;
    } else {
      body(v, Constant<other>{});
      v += other;
    }
  }
}

// Full-width interleaving of two vectors: a0 b0 a1 b1 …
template <class A, size_t... I>
CNNK_INLINE void interleave_at(Vec<A> a, Vec<A> b, Vec<A>& low, Vec<A>& high,
                               std::index_sequence<I...>) {
  constexpr size_t lanes = sizeof...(I);
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * lanes)...);
  high = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * lanes + lanes / 2)...);
#else
  typedef Vec<Mask<A> > Index;
  low = __builtin_shuffle(a, b, Index{static_cast<Mask<A> >(I / 2 + (I % 2) * lanes)...});
  high =
      __builtin_shuffle(a, b, Index{static_cast<Mask<A> >(I / 2 + (I % 2) * lanes + lanes / 2)...});
#endif
}

// A square of lanes x lanes elements: log2(lanes) rounds of interleaving row i
// with row i + lanes/2 turn rows into columns.
template <class A>
CNNK_INLINE void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vec<A> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      interleave_at<A>(rows[i], rows[i + lanes / 2], next[2 * i], next[2 * i + 1],
                       std::make_index_sequence<lanes>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// Weights as panels, [vector of channels][step][lane], zero past the last
// channel. Weight (channel, step) is at channel * channel_stride + steps[step].
template <class T>
void pack_panels(const T* weight, int64_t channels, int64_t channel_stride,
                 const std::vector<int64_t>& steps, Accumulator<T>* panels) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = static_cast<int64_t>(steps.size());
  const int64_t* const step = steps.data();
  const auto consecutive = [&](int64_t i) {
    for (int64_t j = 1; j < lanes; ++j) {
      if (step[i + j] != step[i] + j) return false;
    }
    return true;
  };
  for (int64_t k0 = 0; k0 < channels; k0 += lanes, panels += lanes * count) {
    const int64_t vector = std::min(lanes, channels - k0);
    const T* const from = weight + k0 * channel_stride;
    for (int64_t i = 0; i < count;) {
      A* const to = panels + i * lanes;
      if (channel_stride == 1) {
        store(to,
              vector == lanes ? load_widened(from + step[i]) : load_head(from + step[i], vector));
        ++i;
      } else if (i + lanes <= count && consecutive(i)) {
        Vec<A> square[lanes];
#pragma GCC unroll 16
        for (int64_t k = 0; k < lanes; ++k) {
          square[k] = k < vector ? load_widened(from + k * channel_stride + step[i]) : Vec<A>{};
        }
        transpose<A>(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < lanes; ++j) store(to + j * lanes, square[j]);
        i += lanes;
      } else {
        for (int64_t k = 0; k < lanes; ++k) {
          to[k] = k < vector ? widen(from[k * channel_stride + step[i]]) : A{0};
        }
        ++i;
      }
    }
  }
}
