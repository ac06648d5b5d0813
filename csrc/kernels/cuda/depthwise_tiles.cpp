#include "kernels/cuda/depthwise_tiles.h"

#include <algorithm>
#include <limits>

#include "kernels/conv2d.h"

namespace cnnkernels::cuda {
namespace {

// Whether all taps of a pass at one source pixel a result, or several, are those of a kernel
// without dilation, in their order or turned.
bool set_taps(const ConvolutionPass& pass, DepthwiseTiles& tiles) {
  const int count = pass.kernel_taps(), last = pass.kernel_width - 1;
  if (pass.phase_count != 1 || pass.phases[0].taps != count) return false;
  const PassTap origin = pass.taps[0];
  const int direction = pass.taps[count - 1].row > origin.row ? 1 : -1;
  for (int t = 0; t < count; ++t) {
    const PassTap tap = pass.taps[t];
    if (tap.row != origin.row + direction * (tap.index / pass.kernel_width) ||
        tap.column != origin.column + direction * (tap.index % pass.kernel_width)) {
      return false;
    }
  }
  const bool turned = direction < 0;
  tiles.first_row = origin.row - (turned ? last : 0);
  tiles.first_column = origin.column - (turned ? last : 0);
  tiles.weight_first = turned ? last * (pass.weight_stride_r + pass.weight_stride_s) : 0;
  tiles.weight_stride_r = direction * static_cast<int>(pass.weight_stride_r);
  tiles.weight_stride_s = direction * static_cast<int>(pass.weight_stride_s);
  return true;
}

// Whether the phases of an input gradient are those of a centred kernel at stride 2.
bool set_transposed_taps(const ConvolutionPass& pass, DepthwiseTiles& tiles) {
  const int pad = (pass.kernel_width - 1) / 2;
  for (int i = 0; i < pass.phase_count; ++i) {
    const PassPhase& phase = pass.phases[i];
    for (int t = phase.first_tap; t < phase.first_tap + phase.taps; ++t) {
      const PassTap tap = pass.taps[t];
      if (2 * tap.row != phase.first_row + pad - tap.index / pass.kernel_width ||
          2 * tap.column != phase.first_column + pad - tap.index % pass.kernel_width) {
        return false;
      }
    }
  }
  tiles.transposed = true;
  tiles.weight_stride_r = static_cast<int>(pass.weight_stride_r);
  tiles.weight_stride_s = static_cast<int>(pass.weight_stride_s);
  return true;
}

// The widest access to the source in planes that has its results in one access as well.
int own_columns(const DepthwiseTiles& tiles, int64_t element_bytes, int64_t alignment) {
  const bool centred = tiles.transposed || tiles.first_column == -((tiles.kernel - 1) / 2);
  const bool covers = tiles.transposed
                          ? tiles.result_width == 2 * tiles.source_width
                          : tiles.result_width * tiles.source_step == tiles.source_width;
  if (!centred || !covers) return 0;
  const auto fits = [&](int columns) {
    const int results = tiles.transposed ? 2 * columns : columns / tiles.source_step;
    return tiles.source_width % columns == 0 &&
           alignment % (std::max(columns, results) * element_bytes) == 0;
  };
  const int widest =
      widest_own_columns(tiles.kernel, tiles.source_step, tiles.transposed, element_bytes);
  const int narrow = narrow_own_columns(tiles.transposed);
  if (fits(widest)) return widest;
  if (narrow < widest && fits(narrow)) return narrow;
  return has_paired_columns(tiles.source_step, tiles.transposed) && fits(2) ? 2 : 0;
}

}  // namespace

int depthwise_lanes(int vectors) {
  int lanes = kMostDepthwiseLanes;
  while (lanes > 8 && 8 * round_up(vectors, lanes) > 9 * vectors) lanes /= 2;
  return lanes;
}

std::optional<DepthwiseTiles> depthwise_tiles(const ConvolutionPass& pass, DType dtype,
                                              int64_t alignment) {
  const int64_t element_bytes = element_size(dtype);
  const int kernel = pass.kernel_width, step = pass.source_step_w;
  const bool transposed = pass.result_step_w == 2;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  constexpr int64_t kMostStride = kMost / 16;  // so that offsets of weights have 32 bits
  if (pass.weight_stride_r > kMostStride || pass.weight_stride_s > kMostStride) return std::nullopt;
  if (dtype == DType::float64 || pass.source_channels != 1 || pass.kernel_height != kernel ||
      pass.source_step_h != step || pass.result_step_h != pass.result_step_w ||
      (kernel != 3 && kernel != 5) || step > 2 || pass.result_step_w > 2) {
    return std::nullopt;
  }
  DepthwiseTiles tiles = {};
  tiles.kernel = kernel;
  tiles.source_step = step;
  tiles.images = pass.images;
  tiles.groups = pass.groups;
  tiles.result_channels = pass.result_channels;
  tiles.source_height = pass.source_height;
  tiles.source_width = pass.source_width;
  for (int i = 0; i < pass.phase_count; ++i) {
    const PassPhase& phase = pass.phases[i];
    tiles.result_height =
        std::max(tiles.result_height, phase.first_row + (phase.rows - 1) * pass.result_step_h + 1);
    tiles.result_width = std::max(
        tiles.result_width, phase.first_column + (phase.columns - 1) * pass.result_step_w + 1);
  }
  tiles.weight_stride_group = pass.weight_stride_group;
  tiles.weight_stride_result = pass.weight_stride_result;
  if (!(transposed ? set_transposed_taps(pass, tiles) : set_taps(pass, tiles))) return std::nullopt;

  if (pass.source_stride_w == 1 && pass.result_stride_w == 1) {
    tiles.own_columns = own_columns(tiles, element_bytes, alignment);
    // Tiles are counted in 31 bits.
    const int64_t results = int64_t{tiles.images} * tiles.result_height * tiles.result_width;
    if (results > kMost / (int64_t{tiles.groups} * tiles.result_channels)) return std::nullopt;
    return tiles;
  }
  tiles.channels_last = true;
  // Offsets of a window's row have 32 bits.
  if (pass.source_stride_h > kMost / 8 || pass.result_stride_h > kMost / 8) return std::nullopt;
  const int64_t vector = depthwise_vector_channels(kernel, element_bytes);
  const bool fits = pass.source_stride_c == 1 && pass.result_stride_c == 1 &&
                    tiles.result_channels == 1 && tiles.groups % vector == 0 &&
                    alignment % (vector * element_bytes) == 0;
  if (!fits) return std::nullopt;
  return tiles;
}

}  // namespace cnnkernels::cuda
