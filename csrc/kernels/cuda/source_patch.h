// The tile of results that a block has of a pass, and the patch of the source that lies below it.
//
// A tile is some rows and columns of the results of a phase, of one image or, where planes are
// small, of several. All taps of its results read the same patch, which a block brings to shared
// memory once for every slab of channels: there a tap is one number, its offset from a result's
// pixel, the same for all results of the tile. What lies outside of the image is zero in the patch,
// so that nothing is compared behind.
#pragma once

#include "kernels/cuda/convolution_pass.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels::cuda {

// In pixels of the patch.
struct PatchTap {
  int pixel;   // from that of a result's least tap
  int weight;  // elements of the weight, of channel 0 of both sides
};

struct PatchPhase {
  int tiles_down, tiles_across;  // of the results of an image
  int first_tile;                // tiles are numbered through all phases
  int row, column;    // the patch's first source pixel, from that of the tile's first result
  int height, width;  // of an image's patch
};

// A patch of so many pixels fits no shared memory by far.
constexpr int kTooManyPixels = 1 << 20;

struct SourcePatch {
  int images, rows, columns;    // of the results of a tile
  int results;                  // all of them
  int step_rows, step_columns;  // results from tile to tile: fewer where pooling windows overlap
  int first_row, first_column;  // of the first tile's results: before the image with pool padding
  int source_step_h, source_step_w;  // source pixels between neighbours of the patch
  int result_step_h, result_step_w;  // pixels of the patch between neighbouring results
  int64_t tiles;                     // of all phases
  int pixels;                        // of the largest phase's patch, up to kTooManyPixels
  PatchPhase phases[kMostPassPhases];
  PatchTap taps[kMostPassTaps];
};

// Whether every 16 bytes of a source pixel's channels lie in one piece, and aligned.
bool chunks_are_contiguous(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment);

// Whether the blocks of a convolution pool their results: square windows of 2x2 or 3x3 at stride 2.
bool pools_in_block(const MaxPool2dProblem& pool);
constexpr int kBlockPoolStride = 2;

// The tile of at most so many results that takes the least work, as a pure function. With a pool,
// which is undilated, tiles are of whole windows; without one `pool` is null.
SourcePatch make_source_patch(const ConvolutionPass& pass, int most_results,
                              const MaxPool2dProblem* pool);

// The same with tiles of so many rows and columns of the results of one image, without a pool.
SourcePatch fixed_source_patch(const ConvolutionPass& pass, int rows, int columns);

// Whether offsets inside of a tile's images, and of the weights of a tile's channels, have 32 bits,
// and the patch is none that nothing holds.
bool patch_is_addressable(const ConvolutionPass& pass, const SourcePatch& patch);

}  // namespace cnnkernels::cuda
