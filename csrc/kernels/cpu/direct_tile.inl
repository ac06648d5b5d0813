// The register tile of direct convolution.
//
// KB output channels by P vectors of output pixels live in registers; each tap
// loads P source vectors and broadcasts KB weights for KB*P multiply-adds. The
// tile is as tall as the register file allows (kMaxTileChannels): 4x3 or 6x2
// of 16 registers, 8x3 of 32, so that loads stay below the multiply-adds that
// hide them.

template <class A>
struct TileWeights {
  const A* data;       // of the tile's first output channel
  int64_t out_stride;  // to the next output channel
  int64_t in_stride;   // to the next input channel
};

template <class A>
struct TileSource {
  int64_t plane;  // from one input channel to the next
  int64_t channels;
  const Tap* taps;
  int64_t tap_count;
  // The taps of sources 1 and 3 of a tile of four, whose columns are of another
  // phase than those of 0 and 2; null for other tiles.
  const Tap* odd_taps;
};

// sum += other
template <class A, int KB, int P>
CNNK_INLINE void add_tile(const Vec<A> (&other)[KB][P], Vec<A> (&sum)[KB][P]) {
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[k][p] += other[k][p];
  }
}

// sum = the products of channels [c0, c1) and taps [t0, t1).
template <class A, int KB, int P>
CNNK_INLINE void direct_chain(const A* const (&source)[P], const TileSource<A>& shape,
                              const TileWeights<A>& weights, int64_t c0, int64_t c1, int64_t t0,
                              int64_t t1, Vec<A> (&sum)[KB][P]) {
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[k][p] = Vec<A>{};
  }
  for (int64_t c = c0; c < c1; ++c) {
    const A* const weight = weights.data + c * weights.in_stride;
    for (int64_t t = t0; t < t1; ++t) {
      const A* const tap_weight = weight + shape.taps[t].weight;
      const int64_t offset = c * shape.plane + shape.taps[t].source;
      const int64_t odd_offset = P == 4 ? c * shape.plane + shape.odd_taps[t].source : offset;
      const auto source_vector = [&](int p) {
        return load(source[p] + (p % 2 == 0 ? offset : odd_offset));
      };
      // The shorter side stays in registers while the longer passes: all of
      // both would be one register too many.
      if constexpr (KB < P) {
        Vec<A> w[KB];
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) w[k] = broadcast(tap_weight[k * weights.out_stride]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const Vec<A> x = source_vector(p);
#pragma GCC unroll 8
          for (int k = 0; k < KB; ++k) sum[k][p] += w[k] * x;
        }
      } else {
        Vec<A> x[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) x[p] = source_vector(p);
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) {
          const Vec<A> w = broadcast(tap_weight[k * weights.out_stride]);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sum[k][p] += w * x[p];
        }
      }
    }
  }
}

// The products are summed in chains of kSumLength, kChains of these in a chain of their
// own: of many taps most may lie over the border, and leave a product or two to a chain.
template <class A, int KB, int P>
__attribute__((noinline)) void direct_chains(const A* const (&source)[P],
                                             const TileSource<A>& shape,
                                             const TileWeights<A>& weights,
                                             Vec<A> (&total)[KB][P]) {
  const int64_t channel_block =
      std::max<int64_t>(1, kSumLength / std::max<int64_t>(1, shape.tap_count));
  constexpr int64_t kChains = 16;
  Vec<A> group[KB][P] = {};  // the sum of earlier chains of chains
  bool grouped = false;
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) total[k][p] = Vec<A>{};
  }
  int64_t chains = 0;
  for (int64_t c0 = 0; c0 < shape.channels; c0 += channel_block) {
    const int64_t c1 = std::min(shape.channels, c0 + channel_block);
    for (int64_t t0 = 0; t0 < shape.tap_count; t0 += kSumLength) {
      Vec<A> sum[KB][P];
      direct_chain(source, shape, weights, c0, c1, t0, std::min(shape.tap_count, t0 + kSumLength),
                   sum);
      if (chains == kChains) {
        add_tile<A>(total, group);
        grouped = true;
        chains = 0;
      }
      if (chains > 0) add_tile<A>(total, sum);
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) total[k][p] = sum[k][p];
      }
      ++chains;
    }
  }
  if (grouped) add_tile<A>(group, total);
}

// A sum of one chain, as in a first layer, never leaves its registers.
template <class A, int KB, int P>
CNNK_INLINE void direct_tile(const A* const (&source)[P], const TileSource<A>& shape,
                             const TileWeights<A>& weights, Vec<A> (&total)[KB][P]) {
  if (shape.channels * shape.tap_count <= kSumLength) {
    direct_chain(source, shape, weights, 0, shape.channels, 0, shape.tap_count, total);
  } else {
    direct_chains(source, shape, weights, total);
  }
}

// The tallest tile for P vectors that leaves registers for the operands.
template <int P>
constexpr int kMaxTileChannels = CNNK_VECTOR_REGISTERS >= 32 ? (P == 4 ? 6 : 8)
                                 : P == 1                    ? 8
                                 : P == 2                    ? 6
                                 : P == 3                    ? 4
                                                             : 3;

// Calls body(channel, Constant<KB>) for tiles that cover `channels` channels.
template <int P, class Body>
CNNK_INLINE void for_each_channel_tile(int64_t channels, Body&& body) {
  constexpr int most = kMaxTileChannels<P>;
  int64_t k = 0;
  for (; channels - k >= most; k += most) body(k, Constant<most>{});
  if constexpr (most > 4) {
    for (; channels - k >= 4; k += 4) body(k, Constant<4>{});
  }
  if constexpr (P == 4 && most > 3) {
    for (; channels - k >= 3; k += 3) body(k, Constant<3>{});
  }
  for (; channels - k >= 2; k += 2) body(k, Constant<2>{});
  for (; channels - k >= 1; k += 1) body(k, Constant<1>{});
}

// One output row of some output channels, all images and groups resolved.
template <class A>
struct DirectRow {
  const A* source;  // packed position of output column 0
  TileSource<A> shape;
  TileWeights<A> weights;
  const A* bias;  // of the first channel, or null
  DType dtype;    // of the output
  void* out;
  int64_t out_at;  // element of the first channel's column 0
  int64_t out_channel_step;
  int64_t out_lane_step;
  int64_t width;  // output columns
  int64_t channels;
  bool relu = false;
};

template <class A, int KB, int P>
__attribute__((noinline)) void direct_span(const DirectRow<A>& row, int64_t k,
                                           int64_t first_vector) {
  constexpr int64_t lanes = kLanes<A>;
  // The last vector is moved back to end with the row: its first lanes are
  // computed twice, which costs less than a partial store.
  const int64_t last_start = std::max<int64_t>(0, row.width - lanes);
  int64_t start[P];
  const A* source[P];
  for (int p = 0; p < P; ++p) {
    start[p] = std::min((first_vector + p) * lanes, last_start);
    source[p] = row.source + start[p];
  }
  const int64_t count = std::min(lanes, row.width);
  TileWeights<A> weights = row.weights;
  weights.data += k * weights.out_stride;
  Vec<A> total[KB][P];
  direct_tile(source, row.shape, weights, total);
  for (int i = 0; i < KB; ++i) {
    const int64_t at = row.out_at + (k + i) * row.out_channel_step;
    const Vec<A> bias = row.bias != nullptr ? broadcast(row.bias[k + i]) : Vec<A>{};
    for (int p = 0; p < P; ++p) {
      store_out<A>(row.dtype, row.out, at + start[p] * row.out_lane_step,
                   relu_if<A>(row.relu, total[i][p] + bias), count, row.out_lane_step);
    }
  }
}

template <class A>
void direct_row(const DirectRow<A>& row) {
  const int64_t vectors = ceil_div(row.width, kLanes<A>);
  int64_t v = 0;
  const auto span = [&](auto vectors_at_once) {
    constexpr int P = decltype(vectors_at_once)::value;
    for_each_channel_tile<P>(row.channels, [&](int64_t k, auto tile) {
      direct_span<A, decltype(tile)::value, P>(row, k, v);
    });
    v += P;
  };
  // Two tiles of two vectors beat one of three and one of one.
  while (vectors - v >= 3 && vectors - v != 4) span(Constant<3>{});
  while (vectors - v >= 2) span(Constant<2>{});
  while (vectors - v >= 1) span(Constant<1>{});
}
