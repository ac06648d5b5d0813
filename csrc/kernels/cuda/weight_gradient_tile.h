// The tile of the weight gradient on tensor cores: how a block's warps share it, and how it lies in
// shared memory.
#pragma once

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/source_patch.h"

namespace cnnkernels::cuda {

constexpr int kWeightWarps = 16;
// Of a warp: output channels, and tiles of 8 source channels at a tap.
constexpr int kWarpChannels = 32;
constexpr int kTileChannels = 8;
constexpr int kWarpTiles = 9;
// Tiles are multiplied in threes: loads of one hide behind products of another.
constexpr int kTilesAtOnce = 3;
// Pixels that a warp multiplies at a time.
constexpr int kStepPixels = 32;
// In front of all else: what the threads of a block share.
constexpr int kFrontBytes = 1920;

// Bytes, of a block's shared memory.
struct WeightGradientTile {
  int row_warps, column_warps, depth_warps;  // kWeightWarps in all
  int row_blocks, column_blocks;
  int columns;                         // tiles of a block, all but the last
  int steps;                           // of a pixel tile
  int gradient_planes, source_planes;  // 16-byte chunks of a pixel's channels
  int gradient_plane, source_plane;    // from one chunk's pixels to the next one's
  int stage;                           // of pixels, of which there are two
  int tables;                          // behind them
  int64_t shared;                      // of all

  constexpr int table_pixels() const { return steps * kStepPixels; }
  constexpr int source_place() const { return gradient_planes * gradient_plane; }
};

WeightGradientTile weight_gradient_tile(const ConvolutionPass& pass, const SourcePatch& patch,
                                        int64_t element_bytes, int row_warps, int column_warps);

}  // namespace cnnkernels::cuda
