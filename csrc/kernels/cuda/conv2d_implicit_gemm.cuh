// Convolution as a matrix product on tensor cores, forward and input gradient.
//
// Rows of the product are results, columns are result channels, and the depth is every tap with all
// of its source channels. The matrix of patches is never written. A block's rows are a tile of the
// results of an image, or of several small ones, and it brings the patch of the source below its
// tile to shared memory (source_patch.h), a slab of 32 channels (16 of float32) at a time: the rows
// of all taps are read from there, so that the source is copied once where a product of plain
// matrices would copy it for each tap.
//
//   tile     128 x 128 results by channels, 128 x 64, or 64 x 64 where larger ones leave
//            multiprocessors idle; four warps have a quarter each. A warp of 64 x 64 reads 8
//            ldmatrix (32 cycles of shared memory) for 32 products (256 cycles of its tensor core),
//            one of 64 x 32 takes 24 for 128, and one of 32 x 32 takes 16 for 64, which four warps
//            at once just fill: so large tiles where there are enough of them.
//   step     a slab's products of one tap: 64 bytes of depth
//   stages   the weights of three steps are on their way while one is multiplied. So is the next
//            slab of the patch, by cp.async in NHWC, where a chunk lies in one piece; in NCHW a
//            thread loads a chunk's channels of a pixel, of neighbouring pixels in neighbouring
//            threads, into registers before the products of a step and stores them behind.
//
// Weights are read where they lie if their source channels are chunks in one piece, and else from a
// copy, [group][channel][tap][source channel], filled up to whole chunks with zeros. float32 is
// multiplied in TF32, or in two TF32 parts (tensor_products.cuh).
#pragma once

#include <algorithm>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/tensor_products.cuh"
#include "kernels/cuda/tile_results.cuh"

namespace cnnkernels::cuda {

constexpr int kGemmThreads = 128;
constexpr int kWeightStages = 4;
constexpr int kAhead = kWeightStages - 1;

// Where a block's shared memory begins with its pixels' places, and goes on with slabs of the patch
// and with weights. Results are staged where the last two were.
struct GemmShared {
  int slab_count;
  int slabs, weights, bytes;
};

__host__ __device__ constexpr int slab_bytes(int pixels) {
  return kSlabChunks * chunk_plane_bytes(pixels);
}
__host__ __device__ constexpr int weight_stage_bytes(int columns) {
  return kSlabChunks * chunk_plane_bytes(columns);
}

// A sum as a loop: where the sum of parts is no number, as that of infinite operands never is.
// `weight` is the result channel's.
template <class T>
__device__ inline float plain_sum(const ConvolutionPass& pass, const SourcePatch& patch,
                                  const PatchTile& tile, const TileResult& at, const T* source,
                                  const T* weight) {
  const PassPhase& phase = pass.phases[tile.phase];
  float sum = 0;
  for (int t = phase.first_tap; t < phase.first_tap + phase.taps; ++t) {
    const int row = (tile.row + at.row) * pass.source_step_h + pass.taps[t].row;
    const int column = (tile.column + at.column) * pass.source_step_w + pass.taps[t].column;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(pass.source_height) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(pass.source_width);
    const T* const pixel = source + at.image * pass.source_stride_n + row * pass.source_stride_h +
                           column * pass.source_stride_w;
    for (int c = 0; c < pass.source_channels; ++c) {
      // Times an infinite weight, a zero of the padding is no number either.
      const float value = inside ? to_accumulator(pixel[c * pass.source_stride_c]) : 0;
      sum += value * to_accumulator(weight[patch.taps[t].weight + c]);
    }
  }
  return sum;
}

// Blocks that a multiprocessor runs at once: as many as registers allow without a spill.
template <class Products>
constexpr int gemm_blocks(int rows, int columns, bool contiguous) {
  if (columns == 128) return 2;
  if (Products::kParts > 1) return rows == 128 ? 2 : 3;
  return rows == 128 && !contiguous ? 3 : 4;
}

template <class Products, int kRows, int kColumns, bool kContiguous, bool kPooled>
__global__ void __launch_bounds__(kGemmThreads, gemm_blocks<Products>(kRows, kColumns, kContiguous))
    implicit_gemm_kernel(const __grid_constant__ ConvolutionPass pass,
                         const __grid_constant__ SourcePatch patch, GemmShared layout,
                         const typename Products::Element* source,
                         const typename Products::Element* weight,
                         ResultTarget<typename Products::Element> target, BlockPool pool) {
  using T = typename Products::Element;
  constexpr int kElements = kChunkElements<T>;
  constexpr int kSlabChannels = kSlabChunks * kElements;
  constexpr int kRowTiles = kRows / 32, kColumnTiles = kColumns / 16;  // of a warp
  constexpr int kWeightPlane = chunk_plane_bytes(kColumns);
  constexpr int kWeightPieces = kColumns * kSlabChunks / kGemmThreads;
  if (!kAmpere) return;
  CNNK_DYNAMIC_SHARED(unsigned char, shared);
  int* const offsets = reinterpret_cast<int*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = static_cast<int>(blockIdx.z);
  const int first_channel = static_cast<int>(blockIdx.y) * kColumns;
  const PatchTile tile = patch_tile(pass, patch, static_cast<int>(blockIdx.x));
  const PassPhase& phase = pass.phases[tile.phase];
  const PatchPhase& own = patch.phases[tile.phase];
  const int pixels = patch.images * own.height * own.width;
  const int plane = chunk_plane_bytes(patch.pixels);
  const int slab_count = (pass.source_channels + kSlabChannels - 1) / kSlabChannels;
  const int step_count = slab_count * phase.taps;
  source += tile.image * pass.source_stride_n +
            int64_t{group} * pass.source_channels * pass.source_stride_c;
  weight += group * pass.weight_stride_group + first_channel * pass.weight_stride_result;

  // The weights: a chunk of some columns' source channels, and what is copied next.
  const int weight_chunk = thread % kSlabChunks;
  int weight_row[kWeightPieces];
#pragma unroll
  for (int i = 0; i < kWeightPieces; ++i) {
    const int column = thread / kSlabChunks + i * (kGemmThreads / kSlabChunks);
    weight_row[i] = first_channel + column < pass.result_channels
                        ? static_cast<int>(column * pass.weight_stride_result)
                        : kOutside;
  }
  int next_tap = 0, next_channel = 0, next_slab = 0;
  const auto copy_step = [&](int step) {
    const int channel = next_channel + weight_chunk * kElements;
    const int tap_weight = patch.taps[phase.first_tap + next_tap].weight + channel;
    unsigned char* const stage = shared + layout.weights +
                                 step % kWeightStages * weight_stage_bytes(kColumns) +
                                 weight_chunk * kWeightPlane + thread / kSlabChunks * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kWeightPieces; ++i) {
      const bool inside = weight_row[i] != kOutside && channel < pass.source_channels;
      cp_async<kChunkBytes>(stage + i * (kGemmThreads / kSlabChunks) * kChunkBytes,
                            weight + (inside ? weight_row[i] + tap_weight : 0),
                            inside ? kChunkBytes : 0);
    }
    if constexpr (kContiguous) {
      if (next_tap == 0) {
        copy_patch<kGemmThreads>(source, pass.source_channels, next_channel, offsets, pixels, plane,
                                 shared + layout.slabs + next_slab * slab_bytes(patch.pixels));
        if (++next_slab == layout.slab_count) next_slab = 0;
      }
    }
    if (++next_tap == phase.taps) {
      next_tap = 0;
      next_channel += kSlabChannels;
    }
  };
  const auto load_piece = [&](PatchPiece<T>& piece, int slab, int number) {
    piece.load(source, pass.source_stride_c, pass.source_channels, slab * kSlabChannels, offsets,
               pixels, plane, thread + number * kGemmThreads);
  };

  const int warp_row = warp % 2 * (kRows / 2), warp_column = warp / 2 * (kColumns / 2);
  int row_place[kRowTiles];  // of the rows that this lane's ldmatrix reads
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = warp_row + i * 16 + lane % 16;
    row_place[i] = tile_result(pass, patch, tile, row).pixel * kChunkBytes + lane / 16 * plane;
  }
  const int column_place =
      (warp_column + lane / 16 * 8 + lane % 8) * kChunkBytes + lane / 8 % 2 * kWeightPlane;

  float sums[kRowTiles][kColumnTiles][4] = {};
  find_patch_pixels<kGemmThreads>(pass, patch, tile, offsets);
  __syncthreads();  // the pixels' places are there
  for (int step = 0; step < kAhead; ++step) {
    if (step < step_count) copy_step(step);
    cp_async_commit();
  }
  const int pieces = (pixels * kSlabChunks + kGemmThreads - 1) / kGemmThreads;
  const int pieces_per_step = (pieces + phase.taps - 1) / (phase.taps > 0 ? phase.taps : 1);
  if constexpr (!kContiguous) {
    for (int i = 0; i < pieces && step_count > 0; ++i) {
      PatchPiece<T> piece;
      load_piece(piece, 0, i);
      piece.store(shared + layout.slabs);
    }
  }
  for (int step = 0, slab = 0, tap = 0, buffer = 0; step < step_count; ++step) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();  // the step's copies are there, and the step before is multiplied
    if (step + kAhead < step_count) copy_step(step + kAhead);
    cp_async_commit();
    // Of the next slab, this step's share.
    constexpr int kHeld = kContiguous ? 0 : 2;
    PatchPiece<T> held[kHeld + 1];
    const bool fills = !kContiguous && slab + 1 < slab_count;
    const int first_piece = tap * pieces_per_step;
    if (fills) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        load_piece(held[i], slab + 1, i < pieces_per_step ? first_piece + i : pieces);
      }
    }
    const unsigned char* const rows = shared + layout.slabs + buffer * slab_bytes(patch.pixels) +
                                      patch.taps[phase.first_tap + tap].pixel * kChunkBytes;
    const unsigned char* const columns = shared + layout.weights +
                                         step % kWeightStages * weight_stage_bytes(kColumns) +
                                         column_place;
    const int channels_left = pass.source_channels - slab * kSlabChannels;
#pragma unroll
    for (int half = 0; half < kSlabChunks / 2; ++half) {
      if (half * 2 * kElements >= channels_left) break;
      uint32_t a[kRowTiles][4], b[kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ldmatrix_x4(a[i], rows + row_place[i] + 2 * half * plane);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t two[4];
        ldmatrix_x4(two, columns + j * 8 * kChunkBytes + 2 * half * kWeightPlane);
        b[j][0] = two[0];
        b[j][1] = two[1];
        b[j + 1][0] = two[2];
        b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) Products::add(sums[i][j], a[i], b[j]);
      }
    }
    if (fills) {
      unsigned char* const next_buffer =
          shared + layout.slabs + (buffer ^ 1) * slab_bytes(patch.pixels);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[i].store(next_buffer);
      for (int i = kHeld; i < pieces_per_step; ++i) {
        load_piece(held[kHeld], slab + 1, first_piece + i);
        held[kHeld].store(next_buffer);
      }
    }
    if (++tap == phase.taps) {
      tap = 0;
      ++slab;
      if (++buffer == layout.slab_count) buffer = 0;
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // all is multiplied
  const StagedTile<T, kRows, kColumns> staged = {reinterpret_cast<T*>(shared + layout.slabs),
                                                 pass.result_stride_c != 1};
  const int group_channel = group * pass.result_channels + first_channel;
  const int channels = pass.result_channels - first_channel;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int column = warp_column + j * 8 + lane % 4 * 2 + e % 2;
        if (column >= channels) continue;
        staged.elements[staged.at(row, column)] =
            finished_sum(target, sums[i][j][e], group_channel + column);
      }
    }
  }
  __syncthreads();  // all results are staged
  if constexpr (Products::kParts > 1) {
    for (int i = thread; i < kRows * kColumns; i += kGemmThreads) {
      const int row = i % kRows, column = i / kRows;
      T& result = staged.elements[staged.at(row, column)];
      const TileResult at = tile_result(pass, patch, tile, row);
      if (column >= channels || !at.exists || result == result) continue;
      result = finished_sum(
          target,
          plain_sum(pass, patch, tile, at, source, weight + column * pass.weight_stride_result),
          group_channel + column);
    }
    __syncthreads();  // what was no number is stored
  }
  if constexpr (kPooled) {
    pool_tile<kGemmThreads>(pass, patch, tile, staged, target, pool, group_channel, channels);
  } else {
    store_tile<kGemmThreads>(pass, patch, tile, staged, target, group_channel, channels);
  }
}

// How many slabs of the patch are in shared memory at once: the copies of the next one begin kAhead
// steps before its first; those through registers, a slab before.
inline int patch_slab_count(const ConvolutionPass& pass, bool contiguous) {
  if (!contiguous) return 2;
  int least = kMostPassTaps;
  for (int i = 0; i < pass.phase_count; ++i) {
    if (pass.phases[i].taps > 0) least = std::min(least, pass.phases[i].taps);
  }
  return static_cast<int>(ceil_div(kAhead, least)) + 1;
}

template <class T>
GemmShared gemm_shared(const ConvolutionPass& pass, const SourcePatch& patch,
                       const GemmChoice& choice) {
  GemmShared layout;
  layout.slab_count = patch_slab_count(pass, choice.contiguous);
  layout.slabs = static_cast<int>(round_up(patch.pixels * static_cast<int>(sizeof(int)), 128));
  layout.weights = layout.slabs + layout.slab_count * slab_bytes(patch.pixels);
  const int staged = (choice.rows + kStagedPadding) * (choice.columns + kStagedPadding) *
                     static_cast<int>(sizeof(T));
  layout.bytes = std::max(layout.weights + kWeightStages * weight_stage_bytes(choice.columns),
                          layout.slabs + staged);
  return layout;
}

template <class Products, int kRows, int kColumns, bool kContiguous, bool kPooled>
Error launch_tile(const PassCall& call, const GemmChoice& choice) {
  using T = typename Products::Element;
  const GemmShared layout = gemm_shared<T>(call.pass, call.patch, choice);
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(call.patch.tiles);
  grid.y = static_cast<unsigned>(ceil_div(call.pass.result_channels, kColumns));
  grid.z = static_cast<unsigned>(call.pass.groups);
  grid.block_x = kGemmThreads;
  return launch(implicit_gemm_kernel<Products, kRows, kColumns, kContiguous, kPooled>, grid,
                layout.bytes, call.stream, call.pass, call.patch, layout,
                static_cast<const T*>(call.source), static_cast<const T*>(call.weight),
                call.target<T>(), call.pooling());
}

template <class Products, int kRows, int kColumns>
Error launch_rows(const PassCall& call, const GemmChoice& choice) {
  if (call.pool != nullptr) {
    return choice.contiguous ? launch_tile<Products, kRows, kColumns, true, true>(call, choice)
                             : launch_tile<Products, kRows, kColumns, false, true>(call, choice);
  }
  return choice.contiguous ? launch_tile<Products, kRows, kColumns, true, false>(call, choice)
                           : launch_tile<Products, kRows, kColumns, false, false>(call, choice);
}

// Instantiated in a file of each kind of products.
template <class Products>
Error launch_gemm(const PassCall& call, const GemmChoice& choice) {
  if (choice.rows == 64) return launch_rows<Products, 64, 64>(call, choice);
  if constexpr (Products::kParts == 1) {
    if (choice.columns == 128) return launch_rows<Products, 128, 128>(call, choice);
  }
  return launch_rows<Products, 128, 64>(call, choice);
}

extern template Error launch_gemm<Products16<float16>>(const PassCall& call,
                                                       const GemmChoice& choice);
extern template Error launch_gemm<Products16<bfloat16>>(const PassCall& call,
                                                        const GemmChoice& choice);
extern template Error launch_gemm<ProductsTf32>(const PassCall& call, const GemmChoice& choice);
extern template Error launch_gemm<ProductsOfParts>(const PassCall& call, const GemmChoice& choice);

}  // namespace cnnkernels::cuda
