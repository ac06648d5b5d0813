// Convolution, bias, ReLU and max pooling without storing the convolution.
//
// 2x2 windows at stride 2 close in registers: the input is packed with twice
// the convolution's stride as its phases, so that the four convolution outputs
// of a window are four lanes of the same index in four register tiles. A tile
// is 3 channels by 4 positions of 16 registers, 6 by 4 of 32.
//
// Any other window takes the rows of convolution outputs that a band of pooled
// rows needs, kept in a scratch plane of the first-level cache, and pools them
// from there as max_pool2d_forward.inl does.

#include "kernels/cpu/direct_tile.inl"
#include "kernels/cpu/max_pool2d_argmax.inl"
#include "kernels/cpu/max_pool2d_row.inl"
#include "kernels/cpu/pack_planes.inl"
#include "kernels/cpu/widened_weights.inl"

// One pooled row of some channels, 2x2 at stride 2. `row` describes it as a
// DirectRow whose columns are pooled columns.
template <class A>
struct PooledRow {
  DirectRow<A> row;
  int64_t row_step;  // from the window's first to its second convolution row
  ArgmaxOut argmax;  // elements as of row.out
};

template <class A, int KB>
__attribute__((noinline)) void pooled_span(const PooledRow<A>& pooled, int64_t k, int64_t x) {
  constexpr int64_t lanes = kLanes<A>;
  const DirectRow<A>& row = pooled.row;
  const A* source[4];
  for (int p = 0; p < 4; ++p) source[p] = row.source + (p / 2) * pooled.row_step + x;
  TileWeights<A> weights = row.weights;
  weights.data += k * weights.out_stride;
  Vec<A> total[KB][4];
  direct_tile(source, row.shape, weights, total);
  const int64_t count = std::min(lanes, row.width - x);
  for (int i = 0; i < KB; ++i) {
    // Bias and rounding come before the comparison: the winner, and so the
    // gradient, is that of the three operators.
    const Vec<A> bias = row.bias != nullptr ? broadcast(row.bias[k + i]) : Vec<A>{};
    Winner<A> winner = {rounded<A>(row.dtype, total[i][0] + bias), Vec<Mask<A>>{}};
    const auto compete = [&](auto with_tap) {
#pragma GCC unroll 4
      for (int p = 1; p < 4; ++p) {
        challenge<A, decltype(with_tap)::value>(winner, rounded<A>(row.dtype, total[i][p] + bias),
                                                static_cast<Mask<A>>(p));
      }
    };
    if (pooled.argmax.data != nullptr) {
      compete(std::true_type{});
    } else {
      compete(std::false_type{});
    }
    const int64_t at = row.out_at + (k + i) * row.out_channel_step + x * row.out_lane_step;
    store_out<A>(row.dtype, row.out, at, relu<A>(winner.value), count, row.out_lane_step);
    store_taps<A>(pooled.argmax, at, winner, count, row.out_lane_step);
  }
}

template <class A>
void pooled_row(const PooledRow<A>& pooled) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t width = pooled.row.width;
  for (int64_t v = 0; v < ceil_div(width, lanes); ++v) {
    // As in direct_span, the last vector ends with the row.
    const int64_t x = std::min(v * lanes, std::max<int64_t>(0, width - lanes));
    for_each_channel_tile<4>(pooled.row.channels, [&](int64_t k, auto tile) {
      pooled_span<A, decltype(tile)::value>(pooled, k, x);
    });
  }
}

// The convolution rows [y0, y1) of one channel block with bias and ReLU, as
// plain rows of accumulators, one plane a channel.
template <class A>
void relu_rows(DirectRow<A> row, DType dtype, int64_t y0, int64_t y1, int64_t source_pitch,
               int64_t out_pitch) {
  const A* const source = row.source;
  A* const out = static_cast<A*>(row.out);
  for (int64_t y = y0; y < y1; ++y) {
    row.source = source + y * source_pitch;
    row.out_at = (y - y0) * out_pitch;
    direct_row(row);
  }
  for (int64_t k = 0; k < row.channels; ++k) {
    for (int64_t y = 0; y < y1 - y0; ++y) {
      A* const values = out + k * row.out_channel_step + y * out_pitch;
      for (int64_t x = 0; x < row.width; x += kLanes<A>) {
        store(values + x, relu<A>(rounded<A>(dtype, load(values + x))));
      }
    }
  }
}

template <class A>
void forward(const Conv2dReluMaxPool2dProblem& problem, const Conv2dReluMaxPool2dPlan& plan,
             const ThreadPool& pool, const void* input, const void* weight, const void* bias_data,
             void* output, void* argmax_data) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  constexpr int64_t lanes = kLanes<A>;
  const Conv2dProblem& conv = problem.conv;
  const MaxPool2dProblem& window = problem.pool;
  const ArgmaxOut argmax = {argmax_data, window.compact_argmax(),
                            static_cast<int32_t>(window.no_winner())};
  const bool serial = plan.threads == 1;
  const int64_t group_in = conv.in_channels / conv.groups;
  const int64_t group_out = conv.out_channels / conv.groups;

  const PackedPlanes packed =
      packed_input(conv, plan.pool_in_registers ? 2 * conv.stride_w : conv.stride_w);
  const int64_t packed_image = conv.in_channels * packed.plane();
  const int64_t packed_count = plan.images_per_chunk * packed_image + lanes;
  const int64_t parameters = widens(conv.dtype) ? weight_count(conv) + conv.out_channels : 0;
  const Workspace workspace((packed_count + parameters) * static_cast<int64_t>(sizeof(A)));
  A* const packed_data = workspace.as<A>();
  A* const parameter_data = packed_data + packed_count;
  const A* const bias = widened_bias<A>(conv.dtype, bias_data, conv.out_channels, parameter_data);
  const WidenedWeights<A> weights =
      widened_weights<A>(conv, weight, parameter_data + conv.out_channels);
  const std::vector<Tap> taps = forward_taps(conv, packed, weights.stride_r, weights.stride_s);
  const std::vector<Tap> odd_taps =
      forward_taps(conv, packed, weights.stride_r, weights.stride_s, conv.stride_w);

  const PlaneSource source =
      plane_source(conv.layout, conv.in_channels, conv.in_height, conv.in_width);
  const PlaneSource destination =
      plane_source(window.layout, window.channels, window.out_height, window.out_width);
  const int64_t input_image = image_stride(conv.in_channels, conv.in_height, conv.in_width);
  const int64_t output_image = image_stride(window.channels, window.out_height, window.out_width);
  const int64_t channel_blocks = ceil_div(group_out, plan.channels_per_task);
  const int64_t row_blocks = ceil_div(window.out_height, plan.rows_per_task);
  const int64_t pack_blocks = ceil_div(conv.in_channels, kInterleavedChannels);

  // The scratch of the general path: convolution rows of a band, and the same
  // packed for pooling.
  const PackedPlanes whole_window = packed_pool_input(window);
  const PoolTables<A> tables(window, whole_window);
  const int64_t band_conv_rows = (plan.rows_per_task - 1) * window.stride_h +
                                 (window.kernel_height - 1) * window.dilation_h + 1;
  const int64_t scratch_pitch = round_up(conv.out_width, lanes);
  const int64_t scratch_plane = band_conv_rows * scratch_pitch;
  const int64_t scratch_count = plan.pool_in_registers
                                    ? 0
                                    : plan.channels_per_task * scratch_plane +
                                          (band_conv_rows + 1) * whole_window.pitch() +
                                          window.stride_w * lanes;

  for (int64_t n0 = 0; n0 < conv.batch; n0 += plan.images_per_chunk) {
    const int64_t images = std::min(plan.images_per_chunk, conv.batch - n0);
    parallel_for(pool, images * pack_blocks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / pack_blocks;
        const int64_t c0 = i % pack_blocks * kInterleavedChannels;
        pack_planes_as<A>(conv.dtype, input,
                          (n0 + image) * input_image + c0 * source.channel_stride, source,
                          std::min(kInterleavedChannels, conv.in_channels - c0), packed, A{0},
                          packed_data + image * packed_image + c0 * packed.plane());
      }
    });
    const int64_t tasks = images * conv.groups * channel_blocks * row_blocks;
    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      const Workspace scratch(scratch_count * static_cast<int64_t>(sizeof(A)));
      A* const conv_rows = scratch.as<A>();
      A* const pool_rows_data = conv_rows + plan.channels_per_task * scratch_plane;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row_block = task % row_blocks;
        const int64_t channel_block = task / row_blocks % channel_blocks;
        const int64_t group = task / row_blocks / channel_blocks % conv.groups;
        const int64_t image = task / row_blocks / channel_blocks / conv.groups;
        const A* const planes =
            packed_data + image * packed_image + group * group_in * packed.plane();
        const int64_t k = group * group_out + channel_block * plan.channels_per_task;
        const int64_t channels =
            std::min(plan.channels_per_task, group_out - channel_block * plan.channels_per_task);
        const TileSource<A> shape = {packed.plane(), group_in, taps.data(),
                                     static_cast<int64_t>(taps.size()), odd_taps.data()};
        const TileWeights<A> tile_weights = {weights.data + k * weights.stride_k, weights.stride_k,
                                             weights.stride_c};
        const A* const block_bias = bias != nullptr ? bias + k : nullptr;
        const int64_t out_start = (n0 + image) * output_image + k * destination.channel_stride;
        const int64_t y0 = row_block * plan.rows_per_task;
        const int64_t y1 = std::min(window.out_height, y0 + plan.rows_per_task);

        if (plan.pool_in_registers) {
          PooledRow<A> pooled;
          pooled.row_step = conv.stride_h * packed.pitch();
          pooled.argmax = argmax;
          pooled.row = {nullptr,
                        shape,
                        tile_weights,
                        block_bias,
                        conv.dtype,
                        output,
                        0,
                        destination.channel_stride,
                        destination.column_stride,
                        window.out_width,
                        channels};
          for (int64_t y = y0; y < y1; ++y) {
            pooled.row.source = planes + 2 * y * conv.stride_h * packed.pitch();
            pooled.row.out_at = out_start + y * destination.row_stride;
            pooled_row(pooled);
          }
          continue;
        }

        const int64_t conv_y0 = std::max<int64_t>(0, y0 * window.stride_h - window.pad_top);
        const int64_t conv_y1 =
            std::min(conv.out_height, (y1 - 1) * window.stride_h - window.pad_top +
                                          (window.kernel_height - 1) * window.dilation_h + 1);
        const DType accumulator = std::is_same_v<A, double> ? DType::float64 : DType::float32;
        const DirectRow<A> row = {planes,    shape, tile_weights,  block_bias, accumulator,
                                  conv_rows, 0,     scratch_plane, 1,          conv.out_width,
                                  channels};
        relu_rows(row, conv.dtype, conv_y0, conv_y1, conv.stride_h * packed.pitch(), scratch_pitch);

        PackedPlanes band = whole_window;
        band.top = window.pad_top - y0 * window.stride_h + conv_y0;
        band.rows =
            (y1 - y0 - 1) * window.stride_h + (window.kernel_height - 1) * window.dilation_h + 1;
        const PlaneSource rows_source = {conv_y1 - conv_y0, conv.out_width, scratch_plane,
                                         scratch_pitch, 1};
        for (int64_t i = 0; i < channels; ++i) {
          pack_planes(conv_rows + i * scratch_plane, rows_source, 1, band, lowest, pool_rows_data);
          const PoolRow<A> pool_source = {pool_rows_data,
                                          tables.row_taps.data(),
                                          window.dilation_h * band.pitch(),
                                          window.kernel_height,
                                          window.kernel_width,
                                          tables.first_column.data(),
                                          window.out_width,
                                          whole_window.phases < window.stride_w};
          const int64_t at =
              out_start + i * destination.channel_stride + y0 * destination.row_stride;
          pool_rows<A>(
              window, pool_source, y0, y1, window.stride_h * band.pitch(),
              {conv.dtype, output, argmax, at, destination.row_stride, destination.column_stride});
        }
      }
    });
  }
}
