// The gradient of the weight.
//
// It is a matrix product: rows are output channels, columns are the weights of one, that is taps
// with source channels, and the depth is every output pixel of every image. There are few rows and
// columns and a deep depth. So a block has some rows and columns, and a part of the pixels; each
// part has totals of its own, which a second pass adds up in their order. Results do not depend on
// what runs first.
//
//   tile     the pixels of a block's part come in tiles of up to 512 (source_patch.h): gradients
//            of the tile's pixels and the patch of the source below them are brought to shared
//            memory once, for all taps. While one tile is multiplied the next is under way.
//   columns  are tiles of 8 source channels at a tap, numbered channels first. A block takes
//            neighbours: 36 of them are 32 channels of a 3x3 kernel, or 288 of a 1x1
//   warp     16 warps, each of 32 rows by up to 9 such tiles in 72 registers. Where there are fewer
//            rows and columns than 16 warps cover, warps divide a tile's pixels instead and add up
//            their sums through shared memory in the end, which makes fewer totals too
//
// Both operands lie as [16-byte chunk of channels][pixel], with the depth across: ldmatrix
// transposes 16-bit ones, of float32 lanes load single elements. A tap is an offset into the patch.
// A pixel that does not exist is zero on both sides, wherever its tap points: zero times infinity
// is NaN. Copies are asynchronous in NHWC; in NCHW a lane loads a chunk's elements, of neighbouring
// pixels in neighbouring lanes, before the products of a step and stores them behind.
//
// Floors on an H100, in clocks of a multiprocessor, for 32 pixels by a warp's 32 x 72: of 16 bits
// 36 products take 58 at the rate of mma.sync, 13 ldmatrix take 52 of shared memory; TF32 takes 115
// and 104, three products 346 and 104. A block of 64 x 288 brings 208 bytes a pixel of a 3x3
// kernel, 15 a clock, where the second-level cache gives about 20; 1x1 kernels take 128 x 288, 832
// bytes and 29.
#include <algorithm>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/source_patch.cuh"
#include "kernels/cuda/tensor_products.cuh"
#include "kernels/cuda/weight_gradient_tile.h"

namespace cnnkernels::cuda {
namespace {

// Column number `column` of the product: a tap with a source channel, channels first.
struct WeightColumn {
  PassTap tap;
  int channel;
};
__device__ inline WeightColumn weight_column(const ConvolutionPass& pass, int column) {
  const int tap = column / pass.source_channels;
  return {pass.taps[tap < pass.phases[0].taps ? tap : 0], column % pass.source_channels};
}

// --- On tensor cores ---------------------------------------------------------------------------

constexpr int kWeightThreads = 32 * kWeightWarps;

// The rows and columns that a block has, and its part. In shared memory, and not in registers.
struct WeightBlock {
  int64_t gradient, source;  // elements of its first channels
  int group;
  int first_row;
  int first_column, columns;           // tiles
  int first_channel;                   // of the source, of the patch's first chunk
  int gradient_planes, source_planes;  // that exist
};

template <class T>
__device__ inline WeightBlock weight_block(const ConvolutionPass& pass,
                                           const WeightGradientTile& tile) {
  constexpr int kElements = kChunkElements<T>;
  const int taps = pass.phases[0].taps;
  const int all_columns = (pass.source_channels + kTileChannels - 1) / kTileChannels * taps;
  int rest = static_cast<int>(blockIdx.x);
  WeightBlock block;
  block.first_row = rest % tile.row_blocks * tile.row_warps * kWarpChannels;
  rest /= tile.row_blocks;
  block.first_column = rest % tile.column_blocks * tile.columns;
  block.group = rest / tile.column_blocks;
  const int left = all_columns - block.first_column;
  block.columns = left < tile.columns ? left : tile.columns;
  block.first_channel = block.first_column / taps * kTileChannels;
  const int end = (block.first_column + block.columns - 1) / taps * kTileChannels + kTileChannels;
  const int end_channel = end < pass.source_channels ? end : pass.source_channels;
  block.source_planes = (end_channel - block.first_channel + kElements - 1) / kElements;
  const int planes = (pass.result_channels - block.first_row + kElements - 1) / kElements;
  block.gradient_planes = planes < tile.gradient_planes ? planes : tile.gradient_planes;
  block.gradient =
      (int64_t{block.group} * pass.result_channels + block.first_row) * pass.result_stride_c;
  block.source =
      (int64_t{block.group} * pass.source_channels + block.first_channel) * pass.source_stride_c;
  return block;
}

// Of a warp's tiles: their places in shared memory, in bytes, from a pixel's place in the patch.
// Three of them take one access.
using TilePlaces = Vector<int, 4>[kWarpTiles / kTilesAtOnce];

// The rows and tiles that a warp has, and its share of the pixels. In shared memory too.
struct WarpShare {
  int first_row, first_column, columns;
  int row_warp, depth_warp;
  int threes;  // of tiles that it multiplies
  TilePlaces tiles;
};

// What a lane reads of the first pixel: in a stage, in bytes.
struct LanePlaces {
  int gradient, patch;
};

// Of a tile of pixels, in shared memory.
struct WeightTables {
  int* gradients;  // of each result: its elements, from channel 0 of the tile's first image
  int* places;     // of each result: its pixel of the patch, in bytes
  int* sources;    // of each pixel of the patch: as `gradients`
  int* image;      // the tile's first
};

// Which chunks of which pixels a thread copies: neighbours take the chunks of a pixel, of float32
// four pixels of two chunks.
struct CopyShare {
  int chunk, chunk_step, pixel, pixel_step;

  template <class T>
  __device__ static CopyShare of(int thread, int planes) {
    const int bits = planes >= 8 ? 3 : planes >= 4 ? 2 : planes >= 2 ? 1 : 0;
    if (sizeof(T) == 2 || bits == 0) {
      return {thread & ((1 << bits) - 1), 1 << bits, thread >> bits, kWeightThreads >> bits};
    }
    const int pair = thread >> 3 & ((1 << (bits - 1)) - 1);
    return {(thread & 1) | pair << 1, 1 << bits, (thread >> 1 & 3) | thread >> (bits + 2) << 2,
            kWeightThreads >> bits};
  }
};

// Begins to copy chunks of pixels that lie in one piece.
template <class T>
__device__ inline void copy_planes(const T* channels, const int* offsets, int pixels, int thread,
                                   int planes, int plane_bytes, unsigned char* target) {
  const CopyShare share = CopyShare::of<T>(thread, planes);
#pragma unroll 1
  for (int pixel = share.pixel; pixel < pixels; pixel += share.pixel_step) {
    const int offset = offsets[pixel];
    const bool exists = offset != kOutside;
#pragma unroll 1
    for (int chunk = share.chunk; chunk < planes; chunk += share.chunk_step) {
      cp_async<kChunkBytes>(target + chunk * plane_bytes + pixel * kChunkBytes,
                            channels + (exists ? offset + chunk * kChunkElements<T> : 0),
                            exists ? kChunkBytes : 0);
    }
  }
}

// A chunk on its way through registers.
template <class T>
struct HeldChunk {
  Vector<T, kChunkElements<T>> elements;
  int place;  // in shared memory, or kOutside

  // `channels` is the chunk's first, of which `count` exist.
  __device__ void load(const T* channels, int offset, int64_t stride, int count) {
    const T* const pixel = channels + (offset != kOutside ? offset : 0);
#pragma unroll
    for (int e = 0; e < kChunkElements<T>; ++e) {
      elements[e] = offset != kOutside && e < count ? pixel[e * stride] : from_accumulator<T>(0);
    }
  }
  __device__ void store(unsigned char* shared) const {
    if (place != kOutside) {
      store_vector<kChunkElements<T>>(reinterpret_cast<T*>(shared + place), elements);
    }
  }
};

using WeightSums = float[2][kWarpTiles][4];

// One step of 16-bit elements. `gradients` is what the lane reads of the step's first pixel, and
// `places` are its pixels of the patch; all from `shared`.
template <class Products>
__device__ inline void multiply_step(const unsigned char* shared, const WarpShare& own,
                                     int gradients, int gradient_plane, const int* places, int lane,
                                     WeightSums& sums) {
  uint32_t a[2][2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ldmatrix_x4_transposed(a[half][i],
                             shared + gradients + 2 * i * gradient_plane + half * 16 * kChunkBytes);
    }
  }
  const int place = places[lane];
#pragma unroll
  for (int three = 0; three < kWarpTiles / kTilesAtOnce; ++three) {
    if (three >= own.threes) break;
    const Vector<int, 4> at = own.tiles[three];
#pragma unroll
    for (int j = 0; j < kTilesAtOnce; ++j) {
      uint32_t four[4];
      ldmatrix_x4_transposed(four, shared + (place != kOutside ? place + at[j] : 0));
      const uint32_t b[2][2] = {{four[0], four[1]}, {four[2], four[3]}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          Products::add(sums[i][three * kTilesAtOnce + j], a[half][i], b[half]);
      }
    }
  }
}

// One step of float32, eight pixels at a time. 16 bytes of the gradient are four channels, rows g
// and g + 8 of two products. Where operands may be infinite, one row of products comes after the
// other: that is rare, and registers are short.
template <class Products, bool kInfinite>
__device__ inline void multiply_step_float(const unsigned char* shared, const WarpShare& own,
                                           int gradients, const int* places,
                                           const LanePlaces& at_lane, int lane, WeightSums& sums) {
  constexpr int kRows = kInfinite ? 1 : 2;  // of products at once
#pragma unroll 1
  for (int eight = 0; eight < kStepPixels; eight += 8) {
#pragma unroll
    for (int row = 0; row < 2; row += kRows) {
      __syncwarp();  // keeps loads behind
      const int pixel = eight + lane % 4;
      uint32_t a[kRows][4];
      bool exists[2];
      int of_patch[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto channels = load_vector<2 * kRows>(reinterpret_cast<const float*>(
            shared + gradients + (pixel + 4 * half) * kChunkBytes + row * 2 * sizeof(float)));
#pragma unroll
        for (int e = 0; e < 2 * kRows; ++e) {
          a[e / 2][2 * half + e % 2] = __float_as_uint(channels[e]);
        }
        const int place = places[pixel + 4 * half];
        exists[half] = place != kOutside;
        of_patch[half] = at_lane.patch + place;
      }
#pragma unroll
      for (int three = 0; three < kWarpTiles / kTilesAtOnce; ++three) {
        if (three >= own.threes) break;
        const Vector<int, 4> at = own.tiles[three];
#pragma unroll
        for (int j = 0; j < kTilesAtOnce; ++j) {
          uint32_t b[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            b[half] = *reinterpret_cast<const uint32_t*>(
                shared + (exists[half] ? of_patch[half] + at[j] : 0));
          }
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if constexpr (kInfinite) {
              Products::add_infinite(sums[row][three * kTilesAtOnce + j], a[i], b);
            } else {
              Products::add(sums[i][three * kTilesAtOnce + j], a[i], b);
            }
          }
        }
      }
    }
  }
}

// totals[part][group][output channel][weight of it]
template <class Products, bool kContiguous>
__global__ void __launch_bounds__(kWeightThreads)
    weight_gradient_gemm_kernel(const __grid_constant__ ConvolutionPass pass,
                                const __grid_constant__ SourcePatch patch,
                                const __grid_constant__ WeightGradientTile tile,
                                bool gradient_contiguous,
                                const typename Products::Element* gradient,
                                const typename Products::Element* source, float* totals,
                                int tiles_per_part) {
  using T = typename Products::Element;
  constexpr int kElements = kChunkElements<T>;
  constexpr bool kHalves = sizeof(T) == 2;
  constexpr bool kParts = Products::kParts > 1;
  if (!kAmpere) return;
  CNNK_DYNAMIC_SHARED(unsigned char, shared);
  const int thread = static_cast<int>(threadIdx.x);
  // Of unsigned numbers, of which halves and quarters take one instruction.
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  // In front are the zeros of a pixel that does not exist, and what is not worth a register.
  struct Front {
    uint32_t zeros[kChunkBytes / 4];
    WarpShare shares[kWeightWarps];
    LanePlaces lanes[32];
    WeightBlock block;
    int gradient_pieces, patch_groups, pieces;  // as below
    int count;                                  // of tiles
    int any_nan, infinite;
  };
  static_assert(sizeof(Front) <= kFrontBytes, "nothing else lies there");
  Front& front = *reinterpret_cast<Front*>(shared);
  const WeightBlock& block = front.block;
  const int part = static_cast<int>(blockIdx.y);
  const int begin = part * tiles_per_part;
  if (thread == 0) {
    const int left = static_cast<int>(patch.tiles) - begin;
    front = {};
    front.block = weight_block<T>(pass, tile);
    front.count = left < tiles_per_part ? left : tiles_per_part;
    front.gradient_pieces = gradient_contiguous ? 0 : block.gradient_planes * tile.steps;
    front.patch_groups = (patch.pixels + 31) / 32;
    front.pieces = front.gradient_pieces + block.source_planes * front.patch_groups;
  }
  __syncthreads();  // the front is there
  const int taps = pass.phases[0].taps;

  // The warp's rows and columns, and where its lanes read them.
  const int columns_of_warp = (tile.columns + tile.column_warps - 1) / tile.column_warps;
  if (lane == 0) {
    WarpShare& own = front.shares[warp];
    own.row_warp = warp % tile.row_warps;
    own.depth_warp = warp / (tile.row_warps * tile.column_warps);
    own.first_row = block.first_row + own.row_warp * kWarpChannels;
    own.first_column =
        block.first_column + warp / tile.row_warps % tile.column_warps * columns_of_warp;
    const int left = block.first_column + block.columns - own.first_column;
    own.columns = left < columns_of_warp ? left : columns_of_warp;
    own.threes = own.first_row < pass.result_channels && left > 0
                     ? (own.columns + kTilesAtOnce - 1) / kTilesAtOnce
                     : 0;
  }
  if (warp == 0) {
    front.lanes[lane] = {
        kHalves ? lane / 8 % 2 * tile.gradient_plane + (lane / 16 * 8 + lane % 8) * kChunkBytes
                : lane / 4 * tile.gradient_plane,
        kHalves ? 0 : lane / 16 * tile.source_plane + lane / 4 % 4 * 4};
  }
  for (int i = thread; i < kWeightWarps * kWarpTiles; i += kWeightThreads) {
    // Where a warp has fewer, it multiplies the block's first once more.
    const int of_warp = i % kWarpTiles;
    const int of_block =
        i / kWarpTiles / tile.row_warps % tile.column_warps * columns_of_warp + of_warp;
    const bool exists = of_warp < columns_of_warp && of_block < block.columns;
    const int column = block.first_column + (exists ? of_block : 0);
    const int plane = (column / taps * kTileChannels - block.first_channel) / kElements;
    front.shares[i / kWarpTiles].tiles[of_warp / kTilesAtOnce][of_warp % kTilesAtOnce] =
        plane * tile.source_plane + patch.taps[column % taps].pixel * kChunkBytes;
  }

  // Tables of a tile, of which three are alive: of what is multiplied, of what is under way, and of
  // what is next.
  const auto tables_of = [&](int number) {
    const int pixels = tile.table_pixels();
    int* const first =
        reinterpret_cast<int*>(shared + tile.tables) + number % 3 * (2 * pixels + patch.pixels + 1);
    return WeightTables{first, first + pixels, first + 2 * pixels,
                        first + 2 * pixels + patch.pixels};
  };
  const auto stage_place = [&](int number) { return kFrontBytes + number % 2 * tile.stage; };
  const auto make_tables = [&](int number) {
    const PatchTile pixels = patch_tile(pass, patch, begin + number);
    const WeightTables tables = tables_of(number);
    const int patch_place = stage_place(number) + tile.source_place();
#pragma unroll 1
    for (int i = thread; i < tile.table_pixels(); i += kWeightThreads) {
      const TileResult result = tile_result(pass, patch, pixels, i);
      tables.gradients[i] =
          result.exists ? static_cast<int>(result.image * pass.result_stride_n +
                                           (pixels.row + result.row) * pass.result_stride_h +
                                           (pixels.column + result.column) * pass.result_stride_w)
                        : kOutside;
      tables.places[i] = result.exists ? patch_place + result.pixel * kChunkBytes : kOutside;
    }
    find_patch_pixels<kWeightThreads>(pass, patch, pixels, tables.sources);
    if (thread == 0) *tables.image = pixels.image;
  };

  const auto copy = [&](int number) {
    const WeightTables tables = tables_of(number);
    unsigned char* const stage = shared + stage_place(number);
    if (kContiguous || gradient_contiguous) {
      copy_planes(gradient + block.gradient + *tables.image * pass.result_stride_n,
                  tables.gradients, tile.table_pixels(), thread, block.gradient_planes,
                  tile.gradient_plane, stage);
    }
    if (kContiguous) {
      copy_planes(source + block.source + *tables.image * pass.source_stride_n, tables.sources,
                  patch.pixels, thread, block.source_planes, tile.source_plane,
                  stage + tile.source_place());
    }
    cp_async_commit();
  };
  // What is not copied comes in pieces, of a chunk of 32 pixels, of which a warp takes every 16th.
  HeldChunk<T> held;
  const auto load_piece = [&](int number, int piece) {
    const WeightTables tables = tables_of(number);
    const bool of_gradient = piece < front.gradient_pieces;
    const int chunk = of_gradient ? piece : piece - front.gradient_pieces;
    const int groups = of_gradient ? tile.steps : front.patch_groups;
    const int plane = chunk / groups, pixel = chunk % groups * 32 + lane;
    held.place = kOutside;
    if (piece >= front.pieces || (!of_gradient && pixel >= patch.pixels)) return;
    held.place = stage_place(number) + pixel * kChunkBytes +
                 (of_gradient ? plane * tile.gradient_plane
                              : tile.source_place() + plane * tile.source_plane);
    const int64_t stride = of_gradient ? pass.result_stride_c : pass.source_stride_c;
    const T* const image = of_gradient
                               ? gradient + block.gradient + *tables.image * pass.result_stride_n
                               : source + block.source + *tables.image * pass.source_stride_n;
    const int channels = of_gradient ? pass.result_channels - block.first_row
                                     : pass.source_channels - block.first_channel;
    held.load(image + plane * kElements * stride,
              (of_gradient ? tables.gradients : tables.sources)[pixel], stride,
              channels - plane * kElements);
  };

  WeightSums sums;
  const auto multiply_part = [&] {
#pragma unroll
    for (int i = 0; i < 2 * kWarpTiles * 4; ++i)
      sums[i / 4 / kWarpTiles][i / 4 % kWarpTiles][i % 4] = 0;
    if (front.count > 0) make_tables(0);
    if (front.count > 1) make_tables(1);
    __syncthreads();  // the tables are there
    if (front.count > 0) copy(0);
    if constexpr (!kContiguous) {
      for (int piece = warp; piece < front.pieces && front.count > 0; piece += kWeightWarps) {
        load_piece(0, piece);
        held.store(shared);
      }
    }
    for (int number = 0; number < front.count; ++number) {
      cp_async_wait<0>();
      __syncthreads();  // the tile and the next one's tables are there, the one before is
                        // multiplied
      const bool more = number + 1 < front.count;
      if (more) copy(number + 1);
      if (number + 2 < front.count) make_tables(number + 2);
      const WarpShare& own = front.shares[warp];
      const int gradients = stage_place(number) + front.lanes[lane].gradient +
                            own.row_warp * (kWarpChannels / kElements) * tile.gradient_plane;
      int piece = more ? warp : front.pieces;
      for (int step = own.depth_warp; step < tile.steps; step += tile.depth_warps) {
        if constexpr (!kContiguous) {
          load_piece(number + 1, piece);
          if constexpr (kParts) held.store(shared);
        }
        const int first = gradients + step * kStepPixels * kChunkBytes;
        const int* const places = tables_of(number).places + step * kStepPixels;
        if constexpr (kHalves) {
          multiply_step<Products>(shared, own, first, tile.gradient_plane, places, lane, sums);
        } else if (kParts && front.infinite != 0) {
          multiply_step_float<Products, kParts>(shared, own, first, places, front.lanes[lane], lane,
                                                sums);
        } else {
          multiply_step_float<Products, false>(shared, own, first, places, front.lanes[lane], lane,
                                               sums);
        }
        if constexpr (!kContiguous) {
          if constexpr (!kParts) held.store(shared);
          piece += kWeightWarps;
        }
      }
      if constexpr (!kContiguous) {
        for (; piece < front.pieces; piece += kWeightWarps) {
          load_piece(number + 1, piece);
          held.store(shared);
        }
      }
    }
  };
  // Calls visit(sum, output channel, weight of it) for the lane's sums that exist.
  const auto for_each_sum = [&](auto&& visit) {
    const WarpShare own = front.shares[warp];
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j) {
      if (j >= own.columns) break;
      const int tap = (own.first_column + j) % taps;
      const int channel = (own.first_column + j) / taps * kTileChannels + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = own.first_row +
                          (kHalves ? i * 16 + e / 2 * 8 + lane / 4 : lane / 4 * 4 + i * 2 + e / 2);
          if (row < pass.result_channels && channel + e % 2 < pass.source_channels) {
            visit(sums[i][j][e], row, tap * pass.source_channels + channel + e % 2);
          }
        }
      }
    }
  };

  while (true) {
    multiply_part();
    if (!kParts || front.infinite != 0) break;
    // NaN may be one of the parts' own; then the part is multiplied once more.
    bool is_nan = false;
    for_each_sum([&](float sum, int, int) { is_nan = is_nan || sum != sum; });
    if (is_nan) front.any_nan = 1;
    __syncthreads();  // all is multiplied, and looked at
    if (front.any_nan == 0) break;
    if (thread == 0) front.infinite = 1;
  }

  // Warps of the same rows and columns add up, one after the other.
  const int depth_warp = front.shares[warp].depth_warp;
  float* const staged = reinterpret_cast<float*>(shared + kFrontBytes) +
                        warp % (tile.row_warps * tile.column_warps) * (kTilesAtOnce * 8 * 32) +
                        lane;
  for (int other = 1; other < tile.depth_warps; ++other) {
#pragma unroll
    for (int first = 0; first < kWarpTiles; first += kTilesAtOnce) {
      if (first * tile.column_warps >= tile.columns) break;
      __syncthreads();  // all is multiplied, and what was staged before is added
#pragma unroll
      for (int k = 0; k < kTilesAtOnce * 8; ++k) {
        const float sum = sums[k / 4 % 2][first + k / 8][k % 4];
        if (depth_warp == other) staged[k * 32] = sum;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTilesAtOnce * 8; ++k) {
        float& sum = sums[k / 4 % 2][first + k / 8][k % 4];
        if (depth_warp == 0) sum += staged[k * 32];
      }
    }
  }
  if (depth_warp != 0) return;
  const int64_t weights = int64_t{taps} * pass.source_channels;
  float* const of_part =
      totals + (int64_t{part} * pass.groups + block.group) * pass.result_channels * weights;
  for_each_sum([&](float sum, int row, int weight) { of_part[row * weights + weight] = sum; });
}

// --- Without them: float64, and devices that have none of these products.

// A pixel of the output: element of channel 0 of a group's gradients and of the source below its
// tap (0, 0), and the position of that.
struct DepthPixel {
  int64_t gradient, source;
  int row, column;
};

// Far outside of every image.
constexpr int kNoRow = -(1 << 30);

__device__ inline DepthPixel depth_pixel(const ConvolutionPass& pass, int position, int end) {
  const PassPosition at = pass_position(pass, pass.phases[0], position < end ? position : 0);
  DepthPixel pixel;
  pixel.gradient = at.result;
  pixel.source = at.source;
  pixel.row = position < end ? at.row : kNoRow;
  pixel.column = at.column;
  return pixel;
}

template <class T>
__device__ inline T gradient_at(const DepthPixel& pixel, const T* gradient, int64_t channel) {
  return pixel.row != kNoRow ? gradient[pixel.gradient + channel] : from_accumulator<T>(0);
}

template <class T>
__device__ inline T source_at(const ConvolutionPass& pass, const DepthPixel& pixel,
                              const WeightColumn& column, const T* source) {
  const int row = pixel.row + column.tap.row, x = pixel.column + column.tap.column;
  const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(pass.source_height) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(pass.source_width);
  return inside ? source[pixel.source + row * pass.source_stride_h + x * pass.source_stride_w +
                         column.channel * pass.source_stride_c]
                : from_accumulator<T>(0);
}

constexpr int kPlainTile = 32, kPlainDepth = 16, kPlainThreads = 256;
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    weight_gradient_plain_kernel(const __grid_constant__ ConvolutionPass pass, const T* gradient,
                                 const T* source, Accumulator<T>* totals, int positions_per_part) {
  using A = Accumulator<T>;
  CNNK_SHARED(A, rows, kPlainDepth * kPlainTile);
  CNNK_SHARED(A, columns_, kPlainDepth * kPlainTile);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.z) % pass.groups;
  const int part = static_cast<int>(blockIdx.z) / pass.groups;
  const int columns = pass.phases[0].taps * pass.source_channels;
  const int first_row = static_cast<int>(blockIdx.x) * kPlainTile;
  const int first_column = static_cast<int>(blockIdx.y) * kPlainTile;
  const int positions = pass.images * pass.phases[0].rows * pass.phases[0].columns;
  const int begin = part * positions_per_part;
  const int end = positions - begin < positions_per_part ? positions : begin + positions_per_part;
  gradient += int64_t{group} * pass.result_channels * pass.result_stride_c;
  source += int64_t{group} * pass.source_channels * pass.source_stride_c;
  const int row = thread / 16 * 2, n = thread % 16 * 2;  // of the 2 x 2 sums of a thread
  A sums[2][2] = {};
  for (int first = begin; first < end; first += kPlainDepth) {
    __syncthreads();  // the pixels before are multiplied
    for (int e = thread; e < kPlainDepth * kPlainTile; e += kPlainThreads) {
      const int i = e % kPlainTile;
      const DepthPixel pixel = depth_pixel(pass, first + e / kPlainTile, end);
      rows[e] =
          first_row + i < pass.result_channels
              ? to_accumulator(gradient_at(pixel, gradient, (first_row + i) * pass.result_stride_c))
              : A{0};
      columns_[e] = first_column + i < columns
                        ? to_accumulator(
                              source_at(pass, pixel, weight_column(pass, first_column + i), source))
                        : A{0};
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kPlainDepth; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          sums[i][j] += rows[d * kPlainTile + row + i] * columns_[d * kPlainTile + n + j];
        }
      }
    }
  }
  A* const of_part =
      totals + (int64_t{part} * pass.groups + group) * pass.result_channels * columns;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (first_row + row + i < pass.result_channels && first_column + n + j < columns) {
        of_part[int64_t{first_row + row + i} * columns + first_column + n + j] = sums[i][j];
      }
    }
  }
}

// --- Both.

// Adds up the parts' totals, in their order, and stores them as the weight lies. Of few weights in
// many parts each of `lanes` threads, a power of two, adds up every so many parts.
constexpr int kSumThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const __grid_constant__ ConvolutionPass pass, const Accumulator<T>* totals,
                     int parts, int lanes, T* grad_weight) {
  CNNK_SHARED(Accumulator<T>, sums, kSumThreads);
  const int columns = pass.phases[0].taps * pass.source_channels;
  const int64_t count = int64_t{pass.groups} * pass.result_channels * columns;
  const int thread = static_cast<int>(threadIdx.x), weights = kSumThreads / lanes;
  const int lane = thread / weights;
  const int64_t step = int64_t{gridDim.x} * weights;
  for (int64_t first = int64_t{blockIdx.x} * weights; first < count; first += step) {
    const int64_t i = first + thread % weights;
    Accumulator<T> sum = 0;
    if (i < count) {
#pragma unroll 4
      for (int part = lane; part < parts; part += lanes) sum += totals[part * count + i];
    }
    if (lanes > 1) {
      __syncthreads();  // the weights before are stored
      sums[thread] = sum;
      __syncthreads();
      for (int other = 1; other < lanes && lane == 0; ++other) {
        sum += sums[other * weights + thread];
      }
    }
    if (lane != 0 || i >= count) continue;
    const WeightColumn column = weight_column(pass, static_cast<int>(i % columns));
    const int64_t channels = i / columns;
    const int64_t k = channels % pass.result_channels, group = channels / pass.result_channels;
    grad_weight[group * pass.weight_stride_group + k * pass.weight_stride_result +
                column.channel * pass.weight_stride_source + tap_weight(pass, column.tap)] =
        from_accumulator<T>(sum);
  }
}

template <class T>
Error sum_parts(const ConvolutionPass& pass, int parts, const void* totals, void* grad_weight,
                Stream stream) {
  constexpr int64_t kManyBlocks = 512;
  constexpr int kLeastParts = 4, kMostLanes = 16;  // of a thread, and of a weight
  const int64_t weights =
      int64_t{pass.groups} * pass.result_channels * pass.phases[0].taps * pass.source_channels;
  int lanes = 1;
  while (lanes < kMostLanes && 2 * lanes * kLeastParts <= parts &&
         ceil_div(weights * lanes, kSumThreads) < kManyBlocks) {
    lanes *= 2;
  }
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(std::min(kMostBlocksX, ceil_div(weights * lanes, kSumThreads)));
  grid.block_x = kSumThreads;
  return launch(sum_parts_kernel<T>, grid, 0, stream, pass,
                static_cast<const Accumulator<T>*>(totals), parts, lanes,
                static_cast<T*>(grad_weight));
}

template <class Products>
Error weight_gemm(const WeightGradientChoice& choice, const ConvolutionPass& pass, int parts,
                  const void* gradient, const void* source, void* totals, Stream stream) {
  using T = typename Products::Element;
  const SourcePatch patch = make_source_patch(pass, choice.results, nullptr);
  const WeightGradientTile tile =
      weight_gradient_tile(pass, patch, sizeof(T), choice.row_warps, choice.column_warps);
  const bool contiguous = choice.gradient_contiguous && choice.source_contiguous;
  const auto kernel = contiguous ? weight_gradient_gemm_kernel<Products, true>
                                 : weight_gradient_gemm_kernel<Products, false>;
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(int64_t{pass.groups} * tile.column_blocks * tile.row_blocks);
  grid.y = static_cast<unsigned>(parts);
  grid.block_x = kWeightThreads;
  return launch(kernel, grid, static_cast<int>(tile.shared), stream, pass, patch, tile,
                choice.gradient_contiguous, static_cast<const T*>(gradient),
                static_cast<const T*>(source), static_cast<float*>(totals),
                static_cast<int>(ceil_div(patch.tiles, parts)));
}

}  // namespace

Error weight_gradient_gemm(DType dtype, const WeightGradientChoice& choice,
                           const ConvolutionPass& pass, int parts, const void* gradient,
                           const void* source, void* grad_weight, void* workspace, Stream stream) {
  const auto run = dtype == DType::float16                   ? weight_gemm<Products16<float16>>
                   : dtype == DType::bfloat16                ? weight_gemm<Products16<bfloat16>>
                   : choice.products == TensorProducts::tf32 ? weight_gemm<ProductsTf32>
                                                             : weight_gemm<ProductsOfParts>;
  Error error = run(choice, pass, parts, gradient, source, workspace, stream);
  if (error != kSuccess) return error;
  with_dtype(dtype, [&](auto element) {
    error = sum_parts<decltype(element)>(pass, parts, workspace, grad_weight, stream);
  });
  return error;
}

Error weight_gradient_plain(DType dtype, const ConvolutionPass& pass, int parts,
                            const void* gradient, const void* source, void* grad_weight,
                            void* workspace, Stream stream) {
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(ceil_div(pass.result_channels, kPlainTile));
  grid.y = static_cast<unsigned>(
      ceil_div(int64_t{pass.phases[0].taps} * pass.source_channels, kPlainTile));
  grid.z = static_cast<unsigned>(pass.groups * parts);
  grid.block_x = kPlainThreads;
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    error = launch(weight_gradient_plain_kernel<T>, grid, 0, stream, pass,
                   static_cast<const T*>(gradient), static_cast<const T*>(source),
                   static_cast<Accumulator<T>*>(workspace), positions_of_part(pass, parts));
    if (error == kSuccess) error = sum_parts<T>(pass, parts, workspace, grad_weight, stream);
  });
  return error;
}

Error depthwise_weight_gradient(DType dtype, const ConvolutionPass& pass, int parts,
                                const void* gradient, const void* source, void* grad_weight,
                                void* workspace, Stream stream) {
  Error error = depthwise_weight_totals(dtype, pass, parts, gradient, source, workspace, stream);
  if (error != kSuccess) return error;
  with_dtype(dtype, [&](auto element) {
    error = sum_parts<decltype(element)>(pass, parts, workspace, grad_weight, stream);
  });
  return error;
}

}  // namespace cnnkernels::cuda
