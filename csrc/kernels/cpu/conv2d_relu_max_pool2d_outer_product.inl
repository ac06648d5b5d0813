// Convolution by outer products, bias, ReLU and 2x2 max pooling at stride 2.
//
// The four convolution outputs of a window are four pixels of one register tile
// (outer_product_tile.inl), compared lane by lane before anything is stored:
// one window by 2 or 3 vectors of channels, two windows by one. As everywhere
// with outer products, narrow rows cost nothing and nothing is packed for want
// of stride.

#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"
#include "kernels/cpu/outer_product_pass.inl"

template <int KV>
constexpr int kTileWindows = CNNK_VECTOR_REGISTERS >= 32 || KV == 1 ? 2 : 1;

// Some windows, rows by columns, of one image and group.
template <class A>
struct WindowBlock {
  int64_t rows, columns;
  const A* source;                    // of the first window's first pixel and step
  int64_t source_row, source_column;  // from one pixel to the next
  DType dtype;
  void* out;
  ArgmaxOut argmax;
  int64_t out_at, out_row, out_column, out_channel;
  int64_t channels;
  const A* bias;
};

template <class A, int KV>
__attribute__((noinline)) void outer_product_windows(const OuterProductSteps<A>& steps,
                                                     const WindowBlock<A>& block, int64_t v) {
  constexpr int W = kTileWindows<KV>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = block.rows * block.columns;
  Vec<A> bias[KV] = {};
  for (int w = 0; block.bias != nullptr && w < KV; ++w) {
    const int64_t k = (v + w) * lanes;
    bias[w] = block.channels - k >= lanes ? load(block.bias + k)
                                          : load_first(block.bias + k, block.channels - k, A{0});
  }
  for (int64_t i = 0; i < count; i += W) {
    // The last tile is moved back to end with the block, or, in a block of
    // fewer windows, repeats its last.
    const int64_t start = std::max<int64_t>(0, std::min(i, count - W));
    const A* source[4 * W];
    int64_t at[W];
    for (int j = 0; j < W; ++j) {
      const int64_t window = std::min(start + j, count - 1);
      const int64_t y = window / block.columns;
      const int64_t x = window - y * block.columns;
      const A* const first = block.source + 2 * y * block.source_row + 2 * x * block.source_column;
      source[4 * j] = first;
      source[4 * j + 1] = first + block.source_column;
      source[4 * j + 2] = first + block.source_row;
      source[4 * j + 3] = first + block.source_row + block.source_column;
      at[j] = block.out_at + y * block.out_row + x * block.out_column;
    }
    Vec<A> total[4 * W][KV];
    outer_product_tile(source, steps, v, total);
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) {
#pragma GCC unroll 4
      for (int w = 0; w < KV; ++w) {
        // Bias and rounding come before the comparison: the winner, and so the
        // gradient, is that of the three operators.
        const auto value = [&](int p) {
          return rounded<A>(block.dtype, total[4 * j + p][w] + bias[w]);
        };
        Winner<A> winner = {value(0), Vec<Mask<A>>{}};
#pragma GCC unroll 4
        for (int p = 1; p < 4; ++p) {
          challenge<A>(winner, value(p), static_cast<Mask<A>>(p));
        }
        const int64_t k = (v + w) * lanes;
        const int64_t to = at[j] + k * block.out_channel;
        const int64_t channels = std::min(lanes, block.channels - k);
        store_out<A>(block.dtype, block.out, to, relu<A>(winner.value), channels,
                     block.out_channel);
        store_taps<A>(block.argmax, to, winner, channels, block.out_channel);
      }
    }
  }
}

template <class A>
void forward(const Conv2dReluMaxPool2dProblem& problem, const Conv2dReluMaxPool2dPlan& plan,
             const ThreadPool& pool, const void* input, const void* weight, const void* bias,
             void* output, void* argmax) {
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const PassSource source = forward_source(conv, plan, input, 2);
  const BorderedImages& images = source.images;
  const PlaneSource destination =
      plane_source(window.layout, window.channels, window.out_height, window.out_width);
  const int64_t output_image = image_stride(window.channels, window.out_height, window.out_width);
  forward_pass<A>(conv, plan, pool, source, weight, bias, window.out_height,
                  [&](const ForwardTask<A>& task) {
                    const WindowBlock<A> block = {
                        task.y1 - task.y0,
                        window.out_width,
                        task.source,
                        conv.stride_h * images.row,
                        conv.stride_w * images.column,
                        conv.dtype,
                        output,
                        {argmax, window.compact_argmax(), static_cast<int32_t>(window.no_winner())},
                        task.image * output_image + task.channel * destination.channel_stride +
                            task.y0 * destination.row_stride,
                        destination.row_stride,
                        destination.column_stride,
                        destination.channel_stride,
                        task.channels,
                        task.bias};
                    for_each_vector_tile<CNNK_VECTOR_REGISTERS >= 32 ? 3 : 2>(
                        ceil_div(block.channels, kLanes<A>), [&](int64_t v, auto vectors) {
                          outer_product_windows<A, decltype(vectors)::value>(task.steps, block, v);
                        });
                  });
}
