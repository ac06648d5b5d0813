#include "kernels/cuda/weight_gradient_tile.h"

#include <algorithm>
#include <limits>

namespace cnnkernels::cuda {
namespace {

constexpr int kChunk = 16;  // bytes

int taps_of(const ConvolutionPass& pass) { return pass.phases[0].taps; }

int64_t tiles_of(const ConvolutionPass& pass) {
  return ceil_div(pass.source_channels, kTileChannels) * taps_of(pass);
}

// The most chunks of 8 source channels that a block's tiles touch.
int chunks_of_block(const ConvolutionPass& pass, const WeightGradientTile& tile) {
  const int64_t all = tiles_of(pass), taps = taps_of(pass);
  int64_t most = 0;
  for (int64_t first = 0; first < all; first += tile.columns) {
    const int64_t last = std::min(first + tile.columns, all) - 1;
    most = std::max(most, last / taps - first / taps + 1);
  }
  return static_cast<int>(most);
}

// From one chunk's pixels to the next one's, so that neighbouring threads store to different banks:
// of 16 bits those of a pixel's chunks, of 32 four pixels of two chunks, of which the products'
// loads are too.
int plane_bytes(int planes, int pixels, int64_t element_bytes) {
  const int beyond = element_bytes == 4 || planes < 4 ? 64 : planes < 8 ? 32 : 16;
  return static_cast<int>(round_up(int64_t{pixels} * kChunk - beyond, 128)) + beyond;
}

// An H100's, in clocks of a multiprocessor: of a product of 16 x 16 x 8, which mma.sync starts at
// five eighths of the tensor cores' rate, of 16 bytes of 32 lanes in shared memory, of a byte from
// the second-level cache and to it, and of what all threads wait for.
constexpr double kProductClocks = 1.6, kAccessClocks = 4;
constexpr double kBytesPerClock = 20, kTotalBytesPerClock = 15;
constexpr double kTileClocks = 400, kBlockClocks = 2000;

// Of a tile of pixels, in a block.
double tile_clocks(const WeightGradientTile& tile, const SourcePatch& patch,
                   const WeightGradientChoice& choice, int64_t element_bytes) {
  const int of_warp = static_cast<int>(ceil_div(tile.columns, tile.column_warps));
  const double slots = static_cast<double>(round_up(of_warp, kTilesAtOnce));
  const double warp_steps = static_cast<double>(round_up(tile.steps, tile.depth_warps)) *
                            tile.row_warps * tile.column_warps;
  const bool parts = element_bytes == 4 && choice.products == TensorProducts::exact_parts;
  const double products = warp_steps * slots * 4 * (parts ? 6 : element_bytes == 4 ? 2 : 1);
  double accesses = warp_steps * (element_bytes == 4 ? 2 : 1) * (4 + slots);
  const double gradient = static_cast<double>(tile.gradient_planes) * patch.results;
  const double source = static_cast<double>(tile.source_planes) * patch.pixels;
  // Elements one by one, and stored as chunks.
  const double pieces =
      (choice.gradient_contiguous ? 0 : gradient) + (choice.source_contiguous ? 0 : source);
  accesses += pieces / 32 * (kChunk / static_cast<double>(element_bytes) + 4) / kAccessClocks;
  const double bytes = (gradient + source) * kChunk;
  return std::max({products * kProductClocks, accesses * kAccessClocks, bytes / kBytesPerClock}) +
         kTileClocks;
}

// Of the whole gradient in so many parts, which become fewer where they would be empty.
double gradient_clocks(const ConvolutionPass& pass, const WeightGradientTile& tile,
                       const SourcePatch& patch, double of_tile, int multiprocessors,
                       int64_t* parts) {
  const int64_t tiles_of_part = ceil_div(patch.tiles, *parts);
  *parts = ceil_div(patch.tiles, tiles_of_part);
  const int64_t blocks = int64_t{tile.row_blocks} * tile.column_blocks * pass.groups * *parts;
  const double totals = 4.0 * tile.row_warps * kWarpChannels * tile.columns * kTileChannels;
  const double waves = static_cast<double>(ceil_div(blocks, multiprocessors));
  const double second_pass =
      static_cast<double>(weight_total_bytes(pass, static_cast<int>(*parts), DType::float32)) /
      (multiprocessors * kBytesPerClock);
  return waves * (static_cast<double>(tiles_of_part) * of_tile + totals / kTotalBytesPerClock +
                  kBlockClocks) +
         second_pass;
}

bool is_addressable(const ConvolutionPass& pass, const SourcePatch& patch) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  const int64_t image =
      pass.result_stride_h * pass.phases[0].rows + pass.result_stride_w * pass.phases[0].columns;
  return patch_is_addressable(pass, patch) &&
         pass.result_stride_n * (patch.images - 1) + image <= kMost;
}

bool gradient_is_contiguous(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment) {
  return pass.result_stride_c == 1 && alignment % kChunk == 0 &&
         pass.result_channels * element_bytes % kChunk == 0;
}

}  // namespace

WeightGradientTile weight_gradient_tile(const ConvolutionPass& pass, const SourcePatch& patch,
                                        int64_t element_bytes, int row_warps, int column_warps) {
  constexpr int64_t kTables = 3;
  WeightGradientTile tile = {};
  tile.row_warps = row_warps;
  tile.column_warps = column_warps;
  tile.depth_warps = kWeightWarps / (row_warps * column_warps);
  tile.row_blocks = static_cast<int>(ceil_div(pass.result_channels, row_warps * kWarpChannels));
  const int64_t tiles = tiles_of(pass);
  tile.column_blocks = static_cast<int>(ceil_div(tiles, column_warps * kWarpTiles));
  tile.columns = static_cast<int>(ceil_div(tiles, tile.column_blocks));
  tile.steps = static_cast<int>(ceil_div(patch.results, kStepPixels));
  const int elements = kChunk / static_cast<int>(element_bytes);
  tile.gradient_planes = row_warps * kWarpChannels / elements;
  tile.source_planes = chunks_of_block(pass, tile) * kTileChannels / elements;
  tile.gradient_plane = plane_bytes(tile.gradient_planes, tile.table_pixels(), element_bytes);
  tile.source_plane = plane_bytes(tile.source_planes, patch.pixels, element_bytes);
  tile.stage = static_cast<int>(
      round_up(tile.source_place() + int64_t{tile.source_planes} * tile.source_plane, kFrontBytes));
  const int64_t staged = tile.depth_warps > 1 ? int64_t{row_warps} * column_warps * 32 *
                                                    (kTilesAtOnce * 8) * sizeof(float)
                                              : 0;
  tile.tables = static_cast<int>(kFrontBytes + std::max(2 * int64_t{tile.stage}, staged));
  tile.shared =
      tile.tables + kTables * (2 * tile.table_pixels() + patch.pixels + 1) * int64_t{sizeof(int)};
  return tile;
}

WeightGradientChoice choose_weight_gradient(const ConvolutionPass& pass, DType dtype,
                                            TensorProducts products, int64_t alignment,
                                            const DeviceLimits& limits) {
  const int64_t element_bytes = element_size(dtype);
  WeightGradientChoice choice = {};
  choice.products = products;
  choice.gradient_contiguous = gradient_is_contiguous(pass, element_bytes, alignment);
  choice.source_contiguous = chunks_are_contiguous(pass, element_bytes, alignment);
  const int multiprocessors = std::max(1, limits.multiprocessors);
  double least = std::numeric_limits<double>::infinity();
  for (int results = 512; results >= kStepPixels; results /= 2) {
    const SourcePatch patch = make_source_patch(pass, results, nullptr);
    if (patch.images == 0 || !is_addressable(pass, patch)) continue;
    for (int row_warps = 1; row_warps <= 4; row_warps *= 2) {
      for (int column_warps = 1; column_warps * row_warps <= kWeightWarps; column_warps *= 2) {
        const WeightGradientTile tile =
            weight_gradient_tile(pass, patch, element_bytes, row_warps, column_warps);
        if (tile.shared > limits.shared_bytes_per_block) continue;
        const double of_tile = tile_clocks(tile, patch, choice, element_bytes);
        const int64_t blocks = int64_t{tile.row_blocks} * tile.column_blocks * pass.groups;
        // A quarter to two waves.
        for (int quarters = 1; quarters <= 8; quarters *= 2) {
          int64_t parts = std::clamp<int64_t>(int64_t{multiprocessors} * quarters / 4 / blocks, 1,
                                              std::max<int64_t>(1, patch.tiles));
          const double clocks =
              gradient_clocks(pass, tile, patch, of_tile, multiprocessors, &parts);
          if (clocks >= least) continue;
          least = clocks;
          choice.row_warps = row_warps;
          choice.column_warps = column_warps;
          choice.results = results;
          choice.parts = static_cast<int>(parts);
        }
      }
    }
  }
  return choice;
}

std::optional<int64_t> weight_gradient_shared_bytes(const ConvolutionPass& pass, DType dtype,
                                                    const WeightGradientChoice& choice) {
  const SourcePatch patch = make_source_patch(pass, choice.results, nullptr);
  if (!is_addressable(pass, patch)) return std::nullopt;
  return weight_gradient_tile(pass, patch, element_size(dtype), choice.row_warps,
                              choice.column_warps)
      .shared;
}

}  // namespace cnnkernels::cuda
