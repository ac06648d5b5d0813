#include "kernels/cuda/source_patch.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace cnnkernels::cuda {
namespace {

// Along one axis: results of a tile, from one tile to the next, and of the first.
struct TileAxis {
  int results, step, first;
  int tiles;
};

// Tiles of `units`: results, or pooling windows.
TileAxis cut_axis(int count, int units, int64_t kernel, int64_t stride, int64_t pad) {
  return {static_cast<int>((units - 1) * stride + kernel), static_cast<int>(units * stride),
          static_cast<int>(-pad), static_cast<int>(ceil_div(count, units))};
}

// The range of a phase's taps along both axes.
struct TapRange {
  int first_row = 0, first_column = 0, last_row = 0, last_column = 0;
};

TapRange tap_range(const ConvolutionPass& pass, const PassPhase& phase) {
  TapRange range;
  for (int t = 0; t < phase.taps; ++t) {
    const PassTap tap = pass.taps[phase.first_tap + t];
    const int row = tap.row, column = tap.column;
    range.first_row = t == 0 ? row : std::min(range.first_row, row);
    range.last_row = t == 0 ? row : std::max(range.last_row, row);
    range.first_column = t == 0 ? column : std::min(range.first_column, column);
    range.last_column = t == 0 ? column : std::max(range.last_column, column);
  }
  return range;
}

// The widest step that meets all taps of a phase from all of its results.
void find_steps(const ConvolutionPass& pass, SourcePatch& patch) {
  int step_h = pass.source_step_h, step_w = pass.source_step_w;
  for (int i = 0; i < pass.phase_count; ++i) {
    const PassPhase& phase = pass.phases[i];
    const TapRange range = tap_range(pass, phase);
    for (int t = 0; t < phase.taps; ++t) {
      const PassTap tap = pass.taps[phase.first_tap + t];
      step_h = std::gcd(step_h, tap.row - range.first_row);
      step_w = std::gcd(step_w, tap.column - range.first_column);
    }
  }
  patch.source_step_h = step_h;
  patch.source_step_w = step_w;
  patch.result_step_h = pass.source_step_h / step_h;
  patch.result_step_w = pass.source_step_w / step_w;
}

int patch_extent(int results, int result_step, int first_tap, int last_tap, int source_step) {
  return (results - 1) * result_step + (last_tap - first_tap) / source_step + 1;
}

constexpr int64_t kMostTileChannels = 128;

// Of bringing a patch's pixel to shared memory, in results of one tap.
constexpr double kPixelCost = 1.5;
// Rows of eight neighbours are read without conflicts.
constexpr double kBrokenRowCost = 1.1;

// Units of a phase: results, or pooling windows.
int units_down(const PassPhase& phase, const MaxPool2dProblem* pool) {
  return pool ? static_cast<int>(pool->out_height) : phase.rows;
}
int units_across(const PassPhase& phase, const MaxPool2dProblem* pool) {
  return pool ? static_cast<int>(pool->out_width) : phase.columns;
}

// All else, where the results of a tile are known.
void place_tiles(const ConvolutionPass& pass, const MaxPool2dProblem* pool, SourcePatch& patch) {
  patch.results = patch.images * patch.rows * patch.columns;
  const int stride = pool ? kBlockPoolStride : 1;
  const int windows_down = patch.step_rows / stride;
  const int windows_across = patch.step_columns / stride;
  for (int i = 0; i < pass.phase_count && patch.images > 0; ++i) {
    const PassPhase& phase = pass.phases[i];
    const TapRange range = tap_range(pass, phase);
    PatchPhase& own = patch.phases[i];
    own.tiles_down = static_cast<int>(ceil_div(units_down(phase, pool), windows_down));
    own.tiles_across = static_cast<int>(ceil_div(units_across(phase, pool), windows_across));
    own.first_tile = static_cast<int>(patch.tiles);
    own.row = range.first_row;
    own.column = range.first_column;
    own.height = patch_extent(patch.rows, patch.result_step_h, range.first_row, range.last_row,
                              patch.source_step_h);
    own.width = patch_extent(patch.columns, patch.result_step_w, range.first_column,
                             range.last_column, patch.source_step_w);
    patch.tiles += ceil_div(pass.images, patch.images) * own.tiles_down * own.tiles_across;
    const int64_t pixels = int64_t{patch.images} * own.height * own.width;
    patch.pixels =
        std::max(patch.pixels, static_cast<int>(std::min<int64_t>(kTooManyPixels, pixels)));
    for (int t = phase.first_tap; t < phase.first_tap + phase.taps; ++t) {
      const PassTap tap = pass.taps[t];
      patch.taps[t].pixel = (tap.row - range.first_row) / patch.source_step_h * own.width +
                            (tap.column - range.first_column) / patch.source_step_w;
      patch.taps[t].weight = static_cast<int>(tap.index / pass.kernel_width * pass.weight_stride_r +
                                              tap.index % pass.kernel_width * pass.weight_stride_s);
    }
  }
}

}  // namespace

SourcePatch make_source_patch(const ConvolutionPass& pass, int most_results,
                              const MaxPool2dProblem* pool) {
  SourcePatch patch = {};
  find_steps(pass, patch);
  const PassPhase& largest = pass.phases[0];
  const TapRange largest_range = tap_range(pass, largest);
  const int64_t kernel_h = pool ? pool->kernel_height : 1, kernel_w = pool ? pool->kernel_width : 1;
  const int64_t stride = pool ? kBlockPoolStride : 1;
  const int64_t pad_h = pool ? pool->pad_top : 0, pad_w = pool ? pool->pad_left : 0;
  double least = std::numeric_limits<double>::infinity();
  // More than a tile's results never fit, and many small tiles are not worth trying.
  constexpr int kMostCuts = 64;
  const int first_cuts = static_cast<int>(
      std::max<int64_t>(1, units_across(largest, pool) * stride * kernel_h / most_results));
  const int last_cuts = std::min(units_across(largest, pool), first_cuts + kMostCuts);
  for (int cuts = first_cuts; cuts <= last_cuts; ++cuts) {
    const int across = static_cast<int>(ceil_div(units_across(largest, pool), cuts));
    const TileAxis columns = cut_axis(units_across(largest, pool), across, kernel_w, stride, pad_w);
    const int most_rows = most_results / columns.results;
    if (most_rows < kernel_h) continue;
    const int fitting = static_cast<int>((most_rows - kernel_h) / stride) + 1;
    const int down_tiles = static_cast<int>(ceil_div(units_down(largest, pool), fitting));
    const int down = static_cast<int>(ceil_div(units_down(largest, pool), down_tiles));
    const TileAxis rows = cut_axis(units_down(largest, pool), down, kernel_h, stride, pad_h);
    const int64_t of_image =
        int64_t{patch_extent(rows.results, patch.result_step_h, largest_range.first_row,
                             largest_range.last_row, patch.source_step_h)} *
        patch_extent(columns.results, patch.result_step_w, largest_range.first_column,
                     largest_range.last_column, patch.source_step_w);
    int images = 1;
    if (rows.tiles == 1 && columns.tiles == 1 && of_image < kTooManyPixels / most_results) {
      images = std::clamp(pass.images, 1, most_results / (rows.results * columns.results));
    }
    const double pixels = static_cast<double>(images) * static_cast<double>(of_image);
    const double products = static_cast<double>(most_results) * std::max(1, largest.taps) *
                            (columns.results % 8 == 0 ? 1 : kBrokenRowCost);
    const double cost = static_cast<double>(ceil_div(pass.images, images)) * rows.tiles *
                        columns.tiles * (products + kPixelCost * pixels);
    if (cost < least) {
      least = cost;
      patch.images = images;
      patch.rows = rows.results;
      patch.columns = columns.results;
      patch.step_rows = rows.step;
      patch.step_columns = columns.step;
      patch.first_row = rows.first;
      patch.first_column = columns.first;
    }
    if (columns.results < 8) break;
  }
  place_tiles(pass, pool, patch);
  return patch;
}

SourcePatch fixed_source_patch(const ConvolutionPass& pass, int rows, int columns) {
  SourcePatch patch = {};
  find_steps(pass, patch);
  patch.images = 1;
  patch.rows = patch.step_rows = rows;
  patch.columns = patch.step_columns = columns;
  place_tiles(pass, nullptr, patch);
  return patch;
}

bool chunks_are_contiguous(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment) {
  return pass.source_stride_c == 1 && alignment % kVectorBytes == 0 &&
         pass.source_channels * element_bytes % kVectorBytes == 0 &&
         pass.source_stride_w * element_bytes % kVectorBytes == 0;
}

bool pools_in_block(const MaxPool2dProblem& p) {
  // The stride of a single window is set to 1 on the way here, and is none.
  const auto halves = [](int64_t stride, int64_t windows) {
    return stride == kBlockPoolStride || windows == 1;
  };
  return p.kernel_height == p.kernel_width && (p.kernel_width == 2 || p.kernel_width == 3) &&
         halves(p.stride_h, p.out_height) && halves(p.stride_w, p.out_width) && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.pad_top == p.pad_left;
}

bool patch_is_addressable(const ConvolutionPass& pass, const SourcePatch& patch) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  const int64_t image =
      pass.source_stride_h * pass.source_height + pass.source_stride_w * pass.source_width;
  const int64_t weights = pass.kernel_height * pass.weight_stride_r +
                          pass.kernel_width * pass.weight_stride_s +
                          kMostTileChannels * pass.weight_stride_result;
  return patch.images > 0 && patch.pixels < kTooManyPixels &&
         pass.source_stride_n * (patch.images - 1) + image <= kMost && weights <= kMost;
}

}  // namespace cnnkernels::cuda
