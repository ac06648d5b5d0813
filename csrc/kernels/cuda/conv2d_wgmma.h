// How the kernel of Hopper's warpgroup products cuts a pass; pure functions in host code.
#pragma once

#include "kernels/cuda/source_patch.h"

namespace cnnkernels::cuda {

// Results of a block: rows of eight neighbours, which are what a product reads as a core matrix.
constexpr int kWgmmaRows = 16, kWgmmaColumns = 8;
constexpr int kWgmmaPixels = kWgmmaRows * kWgmmaColumns;
// Channels that are brought to shared memory at a time, and those of 16 bytes of a pixel.
constexpr int kWgmmaSlab = 64, kWgmmaChunk = 8;
constexpr int kMostPatchStages = 2, kMostWeightStages = 4;

struct WgmmaCut {
  int channels;     // of the results of a block: 64 or 128
  int slab_chunks;  // of the patch: less than a slab's where there are fewer channels
  int patch_stages, weight_stages;
  int shared_bytes;
};

SourcePatch wgmma_patch(const ConvolutionPass& pass);

// Of a pass at stride 1, of 16-bit elements. weight_stages is 0 where its patch is too large for a
// copy, or for the shared memory of a block.
WgmmaCut wgmma_cut(const ConvolutionPass& pass, const SourcePatch& patch);

// Of a stage.
constexpr int patch_plane_bytes(const SourcePatch& patch) { return patch.pixels * 16; }
constexpr int patch_bytes(const WgmmaCut& cut, const SourcePatch& patch) {
  return cut.slab_chunks * patch_plane_bytes(patch);
}
constexpr int weight_bytes(int channels) { return channels * kWgmmaSlab * 2; }

}  // namespace cnnkernels::cuda
