#include "kernels/cuda/convolution_pass.h"

#include <limits>

#include "kernels/cuda/conv2d_kernels.h"

namespace cnnkernels::cuda {
namespace {

struct Strides {
  int64_t n, c, h, w;
};

Strides dense_strides(Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::nchw) return {channels * height * width, height * width, width, 1};
  return {height * width * channels, 1, width * channels, channels};
}

// What both passes share; `from` and `to` are the strides of source and result.
ConvolutionPass make_pass(const Conv2dProblem& p, const Strides& from, const Strides& to) {
  ConvolutionPass pass = {};
  pass.images = static_cast<int>(p.batch);
  pass.groups = static_cast<int>(p.groups);
  pass.source_stride_n = from.n;
  pass.source_stride_c = from.c;
  pass.source_stride_h = from.h;
  pass.source_stride_w = from.w;
  pass.result_stride_n = to.n;
  pass.result_stride_c = to.c;
  pass.result_stride_h = to.h;
  pass.result_stride_w = to.w;
  pass.weight_stride_group = p.out_channels / p.groups * p.weight_stride_k;
  pass.weight_stride_r = p.weight_stride_r;
  pass.weight_stride_s = p.weight_stride_s;
  pass.kernel_height = static_cast<int>(p.kernel_height);
  pass.kernel_width = static_cast<int>(p.kernel_width);
  return pass;
}

// The results of a residue class along one axis, and the taps that reach them.
struct AxisClass {
  int results, first;
  int taps;
  int16_t tap[kMostPassTaps], position[kMostPassTaps];
};

// Of the input gradient: input position `residue + i * stride` meets tap r in output position
// i + (residue + pad - r * dilation) / stride, if that divides.
AxisClass gradient_class(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                         int64_t residue) {
  AxisClass axis = {};
  axis.first = static_cast<int>(residue);
  axis.results = residue < in ? static_cast<int>(ceil_div(in - residue, stride)) : 0;
  for (int64_t r = 0; r < kernel; ++r) {
    const int64_t distance = residue + pad - r * dilation;
    if (distance % stride != 0) continue;
    axis.tap[axis.taps] = static_cast<int16_t>(r);
    axis.position[axis.taps] = static_cast<int16_t>(distance / stride);
    ++axis.taps;
  }
  return axis;
}

}  // namespace

std::string conv2d_not_native(const Conv2dProblem& p) {
  // Positions of pixels have 32 bits, those of taps 16.
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  constexpr int64_t kMostTapPosition = std::numeric_limits<int16_t>::max() / 2;
  if (p.kernel_height * p.kernel_width > kMostPassTaps) return "a kernel of more than 256 elements";
  if (p.stride_h * p.stride_w > kMostPassPhases) return "strides of more than 16 residue classes";
  // A grid has a block for eight result channels, or for 32 weights of one.
  constexpr int64_t kMostChannels = 8 * kMostBlocksYZ, kMostWeights = 32 * kMostBlocksYZ;
  const int64_t weights = p.kernel_height * p.kernel_width * (p.in_channels / p.groups);
  const bool small = p.groups <= kMostBlocksYZ && p.in_channels <= kMostChannels &&
                     p.out_channels <= kMostChannels && weights <= kMostWeights &&
                     p.batch * p.in_height <= kMost / p.in_width &&
                     p.batch * p.out_height <= kMost / p.out_width &&
                     p.pad_top + p.kernel_height * p.dilation_h <= kMostTapPosition &&
                     p.pad_left + p.kernel_width * p.dilation_w <= kMostTapPosition;
  return small ? "" : "more pixels, channels or padding than a kernel counts";
}

ConvolutionPass forward_pass(const Conv2dProblem& p) {
  ConvolutionPass pass =
      make_pass(p, dense_strides(p.layout, p.in_channels, p.in_height, p.in_width),
                dense_strides(p.layout, p.out_channels, p.out_height, p.out_width));
  pass.source_channels = static_cast<int>(p.in_channels / p.groups);
  pass.result_channels = static_cast<int>(p.out_channels / p.groups);
  pass.weight_stride_result = p.weight_stride_k;
  pass.weight_stride_source = p.weight_stride_c;
  pass.source_height = static_cast<int>(p.in_height);
  pass.source_width = static_cast<int>(p.in_width);
  pass.source_step_h = static_cast<int>(p.stride_h);
  pass.source_step_w = static_cast<int>(p.stride_w);
  pass.result_step_h = pass.result_step_w = 1;
  pass.phase_count = 1;
  PassPhase& phase = pass.phases[0];
  phase = {static_cast<int>(p.out_height),
           static_cast<int>(p.out_width),
           0,
           0,
           0,
           pass.kernel_taps(),
           0};
  for (int r = 0; r < pass.kernel_height; ++r) {
    for (int s = 0; s < pass.kernel_width; ++s) {
      const int index = r * pass.kernel_width + s;
      pass.taps[index] = {static_cast<int16_t>(r * p.dilation_h - p.pad_top),
                          static_cast<int16_t>(s * p.dilation_w - p.pad_left),
                          static_cast<int16_t>(index)};
    }
  }
  return pass;
}

ConvolutionPass input_gradient_pass(const Conv2dProblem& p) {
  ConvolutionPass pass =
      make_pass(p, dense_strides(p.layout, p.out_channels, p.out_height, p.out_width),
                dense_strides(p.layout, p.in_channels, p.in_height, p.in_width));
  pass.source_channels = static_cast<int>(p.out_channels / p.groups);
  pass.result_channels = static_cast<int>(p.in_channels / p.groups);
  pass.weight_stride_result = p.weight_stride_c;
  pass.weight_stride_source = p.weight_stride_k;
  pass.source_height = static_cast<int>(p.out_height);
  pass.source_width = static_cast<int>(p.out_width);
  pass.source_step_h = pass.source_step_w = 1;
  pass.result_step_h = static_cast<int>(p.stride_h);
  pass.result_step_w = static_cast<int>(p.stride_w);
  int taps = 0;
  for (int64_t a = 0; a < p.stride_h; ++a) {
    const AxisClass rows =
        gradient_class(p.in_height, p.kernel_height, p.stride_h, p.pad_top, p.dilation_h, a);
    for (int64_t b = 0; b < p.stride_w; ++b) {
      const AxisClass columns =
          gradient_class(p.in_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w, b);
      if (rows.results == 0 || columns.results == 0) continue;
      PassPhase& phase = pass.phases[pass.phase_count++];
      phase = {rows.results, columns.results,          rows.first, columns.first,
               taps,         rows.taps * columns.taps, 0};
      for (int r = 0; r < rows.taps; ++r) {
        for (int s = 0; s < columns.taps; ++s) {
          pass.taps[taps++] = {
              rows.position[r], columns.position[s],
              static_cast<int16_t>(rows.tap[r] * pass.kernel_width + columns.tap[s])};
        }
      }
    }
  }
  return pass;
}

int64_t weight_total_bytes(const ConvolutionPass& pass, int parts, DType dtype) {
  return int64_t{parts} * pass.groups * pass.result_channels * pass.phases[0].taps *
         pass.source_channels * accumulator_size(dtype);
}

// Whole slices of either kernel.
int positions_of_part(const ConvolutionPass& pass, int parts) {
  constexpr int kMultiple = 32;
  const int64_t positions = int64_t{pass.images} * pass.phases[0].rows * pass.phases[0].columns;
  return static_cast<int>(round_up(ceil_div(positions, parts), kMultiple));
}

int64_t number_tiles(ConvolutionPass& pass, int pixels) {
  int64_t tiles = 0;
  for (int i = 0; i < pass.phase_count; ++i) {
    PassPhase& phase = pass.phases[i];
    phase.first_tile = static_cast<int>(tiles);
    tiles += ceil_div(int64_t{pass.images} * phase.rows * phase.columns, pixels);
  }
  return tiles;
}

}  // namespace cnnkernels::cuda
