// The weight gradient of convolution in channels_last, read where it lies.
//
// For an output pixel the taps of a kernel row, with all their channels, are one run of the
// input, and the output's gradients of all channels are another. Their outer product is a row
// of the weight gradient. A tile holds KV vectors of the one side by P broadcast elements of
// the other for a block of pixels, up to 64, of whose operands what a tile reads fits the
// first-level cache: all tiles go over a block before the next. So nothing is packed but a border,
// and few channels fill the registers as well as many: 1x16, 2x12 or 3x8 of 32, 1x8, 2x6 or 3x4
// of 16.
//
// A kernel of one tap has the wider side for its vectors. A slice of the blocks has totals of
// its own; the number of slices is the problem's, so that the order of a sum is the same for
// any number of threads.

#include "kernels/cpu/outer_product_pass.inl"
#include "kernels/cpu/weight_totals.inl"

template <int KV>
constexpr int kRunElements = CNNK_VECTOR_REGISTERS >= 32 ? (KV == 1   ? 16
                                                            : KV == 2 ? 12
                                                                      : 8)
                             : KV == 1                   ? 8
                             : KV == 2                   ? 6
                                                         : 4;

// The vectors of the commonest tile.
constexpr int kRunVectors = CNNK_VECTOR_REGISTERS >= 32 ? 3 : 2;

// The pixels of a block, and the steps from one to the next in both operands.
struct RunBlock {
  int64_t rows, columns;
  int64_t vector_row, vector_pixel, scalar_row, scalar_pixel;
};

// What the next block reads of both operands, shared out to the tiles of this one.
struct NextBlock {
  FetchedLines operands[2];
  int64_t lines_of_tile;

  FetchedLines take() {
    FetchedLines& from = operands[operands[0].count > 0 ? 0 : 1];
    const FetchedLines lines = {from.first, std::min(from.count, lines_of_tile)};
    from.first += lines.count * 64;
    from.count -= lines.count;
    return lines;
  }
};

// totals[p][w] (rows of `row_length`) = or += the sum over the block's pixels of vector w times
// element p. The last vector is `last` elements behind the first.
template <class A, int KV, int P>
CNNK_INLINE void run_tile(const RunBlock& block, const A* vectors, int64_t last, const A* scalars,
                          bool add, A* totals, int64_t row_length, FetchedLines lines) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[P][KV];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 3
    for (int w = 0; w < KV; ++w) sum[p][w] = Vec<A>{};
  }
  for (int64_t y = 0; y < block.rows; ++y) {
    const A* vector = vectors + y * block.vector_row;
    const A* scalar = scalars + y * block.scalar_row;
    for (int64_t x = 0; x < block.columns; ++x) {
      lines.fetch_next();
      Vec<A> v[KV];
#pragma GCC unroll 3
      for (int w = 0; w < KV; ++w) v[w] = load(vector + (w < KV - 1 ? w * lanes : last));
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Vec<A> s = broadcast(scalar[p]);
#pragma GCC unroll 3
        for (int w = 0; w < KV; ++w) sum[p][w] += v[w] * s;
      }
      vector += block.vector_pixel;
      scalar += block.scalar_pixel;
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 3
    for (int w = 0; w < KV; ++w) {
      A* const to = totals + p * row_length + w * lanes;
      store(to, add ? load(to) + sum[p][w] : sum[p][w]);
    }
  }
}

// The rows of totals of a whole run.
template <class A, int KV>
__attribute__((noinline)) void run_tiles(const RunBlock& block, const A* vectors, int64_t last,
                                         const A* scalars, int64_t run, bool add, A* totals,
                                         int64_t row_length, NextBlock& next) {
  int64_t p = 0;
  const auto tiles = [&](auto elements) {
    constexpr int P = decltype(elements)::value;
    for (; p + P <= run; p += P) {
      run_tile<A, KV, P>(block, vectors, last, scalars + p, add, totals + p * row_length,
                         row_length, next.take());
    }
  };
  tiles(Constant<kRunElements<KV>>{});
  tiles(Constant<4>{});
  tiles(Constant<1>{});
}

template <class A>
void weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output, const void* input, void* grad_weight) {
  constexpr int64_t lanes = kLanes<A>;
  const GradientRuns runs = gradient_runs(problem, lanes);
  const int64_t vectors = ceil_div(runs.vector_channels, lanes), row_length = vectors * lanes;
  const int64_t totals_slice = problem.kernel_height * runs.run * row_length;
  const Workspace totals_workspace(runs.slices * totals_slice * static_cast<int64_t>(sizeof(A)));
  A* const totals = totals_workspace.as<A>();

  const int64_t packed = gradient_runs_packed_elements(problem, runs);
  const BorderedImages images =
      packed == 0
          ? bordered_images(Layout::nhwc, problem.in_channels, problem.in_height, problem.in_width)
          : bordered_images(Layout::nhwc, problem.in_channels,
                            (runs.block_rows - 1) * problem.stride_h +
                                (problem.kernel_height - 1) * problem.dilation_h + 1,
                            (problem.out_width - 1) * problem.stride_w + problem.kernel_width);
  const PassSource source = {problem.dtype,    input,           problem.in_height,
                             problem.in_width, problem.pad_top, problem.pad_left,
                             problem.stride_h, packed == 0,     images};
  // Rows of pixels of both operands: those of an output row, or any number that follow one
  // another.
  const bool flat = runs.pixels > 0;
  const int64_t input_pixel = flat ? problem.in_channels : problem.stride_w * images.column;
  const int64_t input_row = flat ? runs.columns * input_pixel : problem.stride_h * images.row;
  const int64_t gradient_pixel = problem.out_channels;
  const int64_t gradient_row = runs.columns * gradient_pixel;

  const int64_t tiles_of_block = problem.kernel_height * ceil_div(vectors, int64_t{kRunVectors}) *
                                 ceil_div(runs.run, int64_t{kRunElements<kRunVectors>});
  const int64_t row_blocks = ceil_div(runs.rows, runs.block_rows), blocks = runs.blocks();
  parallel_for(pool, runs.slices, plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace(packed * static_cast<int64_t>(sizeof(A)));
    A* const rows_of_block = workspace.as<A>();
    for (int64_t slice = begin; slice < end; ++slice) {
      A* const to = totals + slice * totals_slice;
      bool add = false;
      for (int64_t b = blocks * slice / runs.slices; b < blocks * (slice + 1) / runs.slices; ++b) {
        const int64_t image = b / row_blocks, y0 = b % row_blocks * runs.block_rows;
        const int64_t rows = std::min(runs.block_rows, runs.rows - y0);
        const A* const gradients =
            static_cast<const A*>(grad_output) + (image * runs.rows + y0) * gradient_row;
        const A* inputs = rows_of_block;
        if (packed == 0) {
          inputs = static_cast<const A*>(input) + image * images.image + y0 * input_row;
        } else {
          pack_rows(source, image, y0 * problem.stride_h, rows_of_block);
        }
        const int64_t columns =
            flat ? std::min(runs.columns, runs.pixels - y0 * runs.columns) : runs.columns;
        for (int64_t x0 = 0; x0 < columns; x0 += runs.block_columns) {
          const int64_t count = std::min(runs.block_columns, columns - x0);
          const A* const gradient = gradients + x0 * gradient_pixel;
          const RunBlock block =
              runs.input_vectors
                  ? RunBlock{rows, count, input_row, input_pixel, gradient_row, gradient_pixel}
                  : RunBlock{rows, count, gradient_row, gradient_pixel, input_row, input_pixel};
          // The processor's prefetchers do not follow a tile from pixel to pixel.
          const auto lines_after = [&](const A* operand, int64_t pixel) {
            const int64_t elements = rows * count * pixel;
            return FetchedLines{reinterpret_cast<const char*>(operand + elements),
                                elements * static_cast<int64_t>(sizeof(A)) / 64};
          };
          NextBlock next = {{lines_after(gradient, gradient_pixel), {nullptr, 0}}, 0};
          if (packed == 0) next.operands[1] = lines_after(inputs + x0 * input_pixel, input_pixel);
          next.lines_of_tile =
              ceil_div(next.operands[0].count + next.operands[1].count, tiles_of_block);
          for (int64_t r = 0; r < problem.kernel_height; ++r) {
            const A* const in = inputs + r * problem.dilation_h * images.row + x0 * input_pixel;
            const A* const vector_side = runs.input_vectors ? in : gradient;
            const A* const scalar_side = runs.input_vectors ? gradient : in;
            for_each_vector_tile<kRunVectors>(vectors, [&](int64_t v, auto tile) {
              constexpr int KV = decltype(tile)::value;
              // The last vector is moved back to end with the channels; its first lanes are
              // computed twice.
              const auto at = [&](int64_t w) {
                return std::min(w * lanes, runs.vector_channels - lanes);
              };
              run_tiles<A, KV>(block, vector_side + at(v), at(v + KV - 1) - at(v), scalar_side,
                               runs.run, add, to + r * runs.run * row_length + v * lanes,
                               row_length, next);
            });
          }
          add = true;
        }
      }
      if (!add) std::fill_n(to, totals_slice, A{0});
    }
  });

  std::vector<GradientWeight> weights;
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t i = 0; i < runs.run; ++i) {
      const int64_t at = runs.input_vectors ? i * problem.weight_stride_k
                                            : i / problem.in_channels * problem.weight_stride_s +
                                                  i % problem.in_channels * problem.weight_stride_c;
      weights.push_back({r * runs.run + i, r * problem.weight_stride_r + at});
    }
  }
  const int64_t channel_step =
      runs.input_vectors ? problem.weight_stride_c : problem.weight_stride_k;
  const bool serial = plan.threads == 1 ||
                      runs.slices * totals_slice * static_cast<int64_t>(sizeof(A)) < kSerialBytes;
  parallel_for(pool, vectors, serial, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      // The last vector ends with the channels, the one before where that begins.
      const int64_t last = runs.vector_channels - lanes;
      const int64_t channel = std::min(v * lanes, last);
      const int64_t count = v + 1 < vectors ? std::min(lanes, last - channel) : lanes;
      write_totals(totals + v * lanes, row_length, runs.slices, totals_slice, weights, count,
                   static_cast<A*>(grad_weight) + channel * channel_step, channel_step);
    }
  });
}
