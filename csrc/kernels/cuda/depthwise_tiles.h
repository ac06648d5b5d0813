// Convolutions of one source channel a group by a square kernel, as the kernels that make tiles of
// results see them: conv2d_depthwise_tiles.cu and conv2d_depthwise_weight.cu.
#pragma once

#include <optional>

#include "kernels/cuda/convolution_pass.h"

namespace cnnkernels::cuda {

// Divides numbers below 2^31 by one that a launch knows, without the twenty instructions that a
// division takes. Reference: Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication".
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }
  constexpr uint32_t quotient(uint32_t number) const {
    return (static_cast<uint32_t>((uint64_t{number} * multiplier) >> 32) + number) >> shift;
  }
};

// Weight (r, s) of a channel counts from the source pixel of a result, which is `first` and on; of
// a turned kernel the strides are negative.
struct DepthwiseTiles {
  int kernel;       // height and width
  int source_step;  // 1 or 2
  // The input gradient at stride 2: results are twice as many as source pixels.
  bool transposed;
  bool channels_last;
  // In planes: the source pixels of a row that a thread reads in one access, the same that its
  // results are above, or 0 where rows are not so aligned and pixels are read one by one.
  int own_columns;
  int images, groups, result_channels;  // of a group
  int source_height, source_width, result_height, result_width;
  int first_row, first_column;
  int64_t weight_first, weight_stride_group, weight_stride_result;
  int weight_stride_r, weight_stride_s;
  // How results are cut, which the launch fills in: tiles of a row, and of a plane.
  Divisor row_tiles, plane_tiles, all_channels;

  void cut(int tile_height, int tile_width) {
    const int64_t of_row = ceil_div(result_width, tile_width);
    row_tiles = Divisor(of_row);
    plane_tiles = Divisor(of_row * ceil_div(result_height, tile_height));
    all_channels = Divisor(int64_t{groups} * result_channels);
  }
};

// The widest access has 16 bytes of the source or of the results, or half of that where a kernel of
// more taps takes the registers. Rows of 28 pixels of 16 bits are aligned to 8 bytes.
constexpr int widest_own_columns(int kernel, int step, bool transposed, int64_t element_bytes) {
  const int vector = static_cast<int>(kVectorBytes / element_bytes);
  if (transposed) return vector / 2;
  return kernel == 3 || step == 2 || element_bytes == 4 ? vector : vector / 2;
}
constexpr int narrow_own_columns(bool transposed) { return transposed ? 2 : 4; }
// Those of 14 are in pairs.
constexpr bool has_paired_columns(int step, bool transposed) { return step == 1 && !transposed; }

// Channels of a thread in NHWC: 8 bytes, or as many as have their weights in registers.
constexpr int depthwise_vector_channels(int kernel, int64_t element_bytes) {
  return kernel == 3 ? static_cast<int>(8 / element_bytes) : 2;
}
constexpr int kMostDepthwiseLanes = 16;
constexpr int kTileThreads = 128;  // of a block
// Lanes of a block for so many vectors of channels: few of them idle.
int depthwise_lanes(int vectors);

// The tiles of a pass, if these kernels take it. `alignment` is of both tensors, in bytes.
std::optional<DepthwiseTiles> depthwise_tiles(const ConvolutionPass& pass, DType dtype,
                                              int64_t alignment);

Error depthwise_tiles_pass(DType dtype, const DepthwiseTiles& tiles, const void* source,
                           const void* weight, const void* bias, void* result, bool relu,
                           Stream stream);
// totals[part][channel][weight]
Error depthwise_tiles_weight_totals(DType dtype, const DepthwiseTiles& tiles, int parts,
                                    const void* gradient, const void* source, void* totals,
                                    Stream stream);

}  // namespace cnnkernels::cuda
