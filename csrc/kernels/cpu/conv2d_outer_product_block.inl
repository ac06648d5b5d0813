// Blocks of pixels by outer products: the loop over register tiles, and their stores.

#include "kernels/cpu/outer_product_pass.inl"

// Where the results of the tiles go.
template <class A>
struct ChannelsOut {
  DType dtype;
  void* data;
  int64_t channel_step;
  int64_t channels;
  const A* bias;  // of the first channel, or null
  bool relu = false;
};

// Some output pixels, rows by columns, of one image and group.
template <class A>
struct PixelBlock {
  int64_t rows, columns;
  const A* source;  // of the first pixel's first step
  int64_t source_row, source_column;
  int64_t out_at, out_row, out_column;
  int64_t pixel_elements;  // of the source that a pixel adds to those before it
  bool fetches;            // what lies behind the block in memory: the next block's source
};

// Channels of P pixels that follow one another in memory, plane by plane.
template <class A, int KV, int P>
CNNK_INLINE void store_planes(const ChannelsOut<A>& out, int64_t at, int64_t k,
                              const Vec<A> (&total)[P][KV]) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 4
  for (int v = 0; v < KV; ++v) {
    const int64_t count = std::min<int64_t>(lanes, out.channels - k - v * lanes);
    A* const to = static_cast<A*>(out.data) + at + (k + v * lanes) * out.channel_step;
#pragma GCC unroll 4
    for (int p0 = 0; p0 < P; p0 += lanes) {
      constexpr int whole = P < lanes ? P : lanes;
      const int pixels = std::min(whole, P - p0);
      Vec<A> rows[lanes];
#pragma GCC unroll 16
      for (int p = 0; p < lanes; ++p) rows[p] = p0 + p < P ? total[p0 + p][v] : Vec<A>{};
      transpose<A>(rows);
      for (int64_t i = 0; i < count; ++i) {
        // Sizes known when compiled become plain stores.
        if (pixels == whole) {
          __builtin_memcpy(to + i * out.channel_step + p0, &rows[i], whole * sizeof(A));
        } else {
          __builtin_memcpy(to + i * out.channel_step + p0, &rows[i],
                           (P % lanes == 0 ? lanes : P % lanes) * sizeof(A));
        }
      }
    }
  }
}

template <class A, int KV>
__attribute__((noinline)) void outer_product_pixels(const OuterProductSteps<A>& steps,
                                                    const ChannelsOut<A>& out,
                                                    const PixelBlock<A>& block, int64_t v) {
  constexpr int P = kTilePixels<KV>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = block.rows * block.columns;
  const bool plain = std::is_same_v<A, double> || out.dtype == DType::float32;
  const bool planes = plain && out.channel_step != 1 && block.out_column == 1 &&
                      (block.rows == 1 || block.out_row == block.columns) && count >= P;
  // Vectors of channels share out what is to be fetched, and tiles a vector's share, so that
  // memory is read all the while.
  const int64_t vectors = ceil_div(out.channels, lanes);
  const int64_t behind = block.fetches ? count * block.pixel_elements : 0;
  FetchedLines lines = {reinterpret_cast<const char*>(block.source + behind + behind * v / vectors),
                        0};
  const int64_t lines_of_tile = ceil_div(
      behind * KV / vectors / ceil_div(count, P) * static_cast<int64_t>(sizeof(A)), int64_t{64});
  int64_t y = 0, x = 0;  // of the first pixel
  for (int64_t i = 0; i < count; i += P) {
    // The last tile is moved back to end with the block; where there are fewer
    // pixels than a tile has, the last is computed several times.
    const int64_t start = std::max<int64_t>(0, std::min(i, count - P));
    if (start != i) {
      y = start / block.columns;
      x = start % block.columns;
    }
    const A* source[P];
    int64_t at[P];
    if (x + P <= block.columns) {
      const A* const first = block.source + y * block.source_row + x * block.source_column;
      const int64_t first_at = block.out_at + y * block.out_row + x * block.out_column;
      for (int p = 0; p < P; ++p) {
        source[p] = first + p * block.source_column;
        at[p] = first_at + p * block.out_column;
      }
      x += P;
    } else {
      for (int p = 0; p < P; ++p) {
        if (x == block.columns && start + p < count) {
          x = 0;
          ++y;
        }
        const int64_t column = std::min(x, block.columns - 1);
        source[p] = block.source + y * block.source_row + column * block.source_column;
        at[p] = block.out_at + y * block.out_row + column * block.out_column;
        ++x;
      }
    }
    if (x >= block.columns) {
      x = 0;
      ++y;
    }
    // A few at once; more, step by step.
    constexpr int64_t kFewLines = 8;
    Vec<A> total[P][KV];
    lines.count = lines_of_tile;
    if (lines_of_tile > kFewLines) {
      outer_product_tile<true>(source, steps, v, total, lines);
      lines.first += lines_of_tile * 64;
    } else {
      while (lines.count > 0) lines.fetch_next();
      outer_product_tile(source, steps, v, total);
    }
    const int64_t k = v * lanes;
    if (out.bias != nullptr) {
      for (int w = 0; w < KV; ++w) {
        const int64_t channels = std::min(lanes, out.channels - k - w * lanes);
        const A* const from = out.bias + k + w * lanes;
        const Vec<A> bias = channels == lanes ? load(from) : load_first(from, channels, A{0});
        for (int p = 0; p < P; ++p) total[p][w] += bias;
      }
    }
    if (out.relu) {
      for (int w = 0; w < KV; ++w) {
        for (int p = 0; p < P; ++p) total[p][w] = relu<A>(total[p][w]);
      }
    }
    if (planes) {
      store_planes(out, at[0], k, total);
      continue;
    }
    for (int w = 0; w < KV; ++w) {
      const int64_t channels = std::min(lanes, out.channels - k - w * lanes);
      for (int p = 0; p < P; ++p) {
        store_out<A>(out.dtype, out.data, at[p] + (k + w * lanes) * out.channel_step, total[p][w],
                     channels, out.channel_step);
      }
    }
  }
}

template <class A>
void outer_product_vectors(const OuterProductSteps<A>& steps, const ChannelsOut<A>& out,
                           const PixelBlock<A>& block) {
  const auto tile = [&](int64_t v, auto vectors) {
    outer_product_pixels<A, decltype(vectors)::value>(steps, out, block, v);
  };
  const int64_t vectors = ceil_div(out.channels, kLanes<A>);
  // Planes are stored by 8 pixels, not by 6.
  if (CNNK_VECTOR_REGISTERS >= 32 && out.channel_step != 1) {
    for_each_vector_tile<3>(vectors, tile);
  } else {
    for_each_vector_tile(vectors, tile);
  }
}

// All vectors go over some pixels before the next, so that these stay in the second-level
// cache; over enough of them that reading the weights again counts for little.
template <class A>
void outer_product_block(const OuterProductSteps<A>& steps, const ChannelsOut<A>& out,
                         PixelBlock<A> block) {
  constexpr int64_t kElements = 64 * 1024, kFewestPixels = 96;
  constexpr int64_t kWrittenElements = 16 * 1024, kWholeTiles = 24;
  // Rows that follow one another without a gap are one.
  if (block.source_row == block.columns * block.source_column &&
      block.out_row == block.columns * block.out_column) {
    block.columns *= block.rows;
    block.rows = 1;
  }
  int64_t pixels = std::max(kFewestPixels, kElements / (block.pixel_elements + out.channels));
  if (out.channel_step == 1 && out.channels >= 2 * block.pixel_elements) {
    // Writing bounds the block: what a vector of channels writes lies in few pages.
    pixels = std::clamp(kWrittenElements / out.channels, kWholeTiles, pixels);
  }
  PixelBlock<A> part = block;
  if (block.rows == 1) {
    const int64_t columns =
        round_up(ceil_div(block.columns, ceil_div(block.columns, pixels)), kWholeTiles);
    for (int64_t x = 0; x < block.columns; x += columns) {
      part.columns = std::min(columns, block.columns - x);
      part.source = block.source + x * block.source_column;
      part.out_at = block.out_at + x * block.out_column;
      outer_product_vectors(steps, out, part);
    }
    return;
  }
  part.fetches = false;
  const int64_t rows = std::max<int64_t>(1, pixels / block.columns);
  for (int64_t y = 0; y < block.rows; y += rows) {
    part.rows = std::min(rows, block.rows - y);
    part.source = block.source + y * block.source_row;
    part.out_at = block.out_at + y * block.out_row;
    outer_product_vectors(steps, out, part);
  }
}
