// A patch of the source in shared memory: as 16-byte chunks of a pixel's channels,
// [chunk of the slab][pixel], so that eight neighbouring pixels of a chunk are the 128 bytes in
// which an ldmatrix reads its eight rows, whatever tap they are read for.
#pragma once

#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/source_patch.h"

namespace cnnkernels::cuda {

constexpr int kChunkBytes = 16;
// Chunks of a slab: 32 channels of 16 bits, or 16 of 32.
constexpr int kSlabChunks = 4;

template <class T>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(T));

// The bytes from one chunk's pixels to the next one's: 32 more than a multiple of 128, so that the
// four chunks of two pixels, which neighbouring threads copy, lie in different banks.
__host__ __device__ constexpr int chunk_plane_bytes(int pixels) {
  return (pixels * kChunkBytes + 95) / 128 * 128 + 32;
}

constexpr int kOutside = -1;

// Which tile a block has.
struct PatchTile {
  int phase;
  int image;        // the first
  int row, column;  // of the phase's results: the tile's first, which may lie before the image
};

__device__ inline PatchTile patch_tile(const ConvolutionPass& pass, const SourcePatch& patch,
                                       int tile) {
  int phase = 0;
  while (phase + 1 < pass.phase_count && patch.phases[phase + 1].first_tile <= tile) ++phase;
  const PatchPhase& own = patch.phases[phase];
  const int of_phase = tile - own.first_tile;
  const int across = of_phase % own.tiles_across, rest = of_phase / own.tiles_across;
  PatchTile at;
  at.phase = phase;
  at.image = rest / own.tiles_down * patch.images;
  at.row = patch.first_row + rest % own.tiles_down * patch.step_rows;
  at.column = patch.first_column + across * patch.step_columns;
  return at;
}

// Result number `local` of a tile.
struct TileResult {
  bool exists;
  int image, row, column;  // of the tile
  int pixel;               // of the patch, for the least tap
};

__device__ inline TileResult tile_result(const ConvolutionPass& pass, const SourcePatch& patch,
                                         const PatchTile& tile, int local) {
  const PassPhase& phase = pass.phases[tile.phase];
  const PatchPhase& own = patch.phases[tile.phase];
  const bool inside = local < patch.results;
  if (!inside) local = 0;
  TileResult at;
  at.column = local % patch.columns;
  at.row = local / patch.columns % patch.rows;
  at.image = local / patch.columns / patch.rows;
  at.pixel = (at.image * own.height + at.row * patch.result_step_h) * own.width +
             at.column * patch.result_step_w;
  at.exists = inside && tile.image + at.image < pass.images &&
              static_cast<unsigned>(tile.row + at.row) < static_cast<unsigned>(phase.rows) &&
              static_cast<unsigned>(tile.column + at.column) < static_cast<unsigned>(phase.columns);
  return at;
}

// Where each pixel of the patch lies in the source, in elements of channel 0 from that of the
// tile's first image, or kOutside.
template <int kThreads>
__device__ inline void find_patch_pixels(const ConvolutionPass& pass, const SourcePatch& patch,
                                         const PatchTile& tile, int* offsets) {
  const PatchPhase& own = patch.phases[tile.phase];
  const int pixels = patch.images * own.height * own.width;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < pixels; i += kThreads) {
    const int image = i / own.width / own.height;
    const int row =
        tile.row * pass.source_step_h + own.row + i / own.width % own.height * patch.source_step_h;
    const int column =
        tile.column * pass.source_step_w + own.column + i % own.width * patch.source_step_w;
    const bool inside = tile.image + image < pass.images &&
                        static_cast<unsigned>(row) < static_cast<unsigned>(pass.source_height) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(pass.source_width);
    offsets[i] = inside
                     ? static_cast<int>(image * pass.source_stride_n + row * pass.source_stride_h +
                                        column * pass.source_stride_w)
                     : kOutside;
  }
}

// Begins to copy a slab of the patch, of a source whose chunks lie in one piece. `source` is
// channel 0 of the group in the tile's first image.
template <int kThreads, class T>
__device__ inline void copy_patch(const T* source, int channels, int first_channel,
                                  const int* offsets, int pixels, int plane_bytes,
                                  unsigned char* slab) {
  for (int i = static_cast<int>(threadIdx.x); i < pixels * kSlabChunks; i += kThreads) {
    const int pixel = i / kSlabChunks, chunk = i % kSlabChunks;
    const int channel = first_channel + chunk * kChunkElements<T>;
    const int offset = offsets[pixel];
    const bool inside = offset != kOutside && channel < channels;
    cp_async<kChunkBytes>(slab + chunk * plane_bytes + pixel * kChunkBytes,
                          source + (inside ? offset + channel : 0), inside ? kChunkBytes : 0);
  }
}

// One chunk of a pixel on its way through registers: of a source in planes, where the threads of a
// warp take neighbouring pixels.
template <class T>
struct PatchPiece {
  Vector<T, kChunkElements<T>> elements;
  int place;  // in the slab, in bytes, or kOutside

  __device__ void load(const T* source, int64_t channel_stride, int channels, int first_channel,
                       const int* offsets, int pixels, int plane_bytes, int piece) {
    int chunk = 0;
    while (piece >= pixels && chunk < kSlabChunks) {
      piece -= pixels;
      ++chunk;
    }
    if (chunk == kSlabChunks) {
      place = kOutside;
      return;
    }
    place = chunk * plane_bytes + piece * kChunkBytes;
    const int offset = offsets[piece];
    const int channel = first_channel + chunk * kChunkElements<T>;
    const T* const pixel = source + (offset != kOutside ? offset + channel * channel_stride : 0);
#pragma unroll
    for (int e = 0; e < kChunkElements<T>; ++e) {
      elements[e] = offset != kOutside && channel + e < channels ? pixel[e * channel_stride]
                                                                 : from_accumulator<T>(0);
    }
  }
  __device__ void store(unsigned char* slab) const {
    if (place != kOutside) {
      store_vector<kChunkElements<T>>(reinterpret_cast<T*>(slab + place), elements);
    }
  }
};

}  // namespace cnnkernels::cuda
