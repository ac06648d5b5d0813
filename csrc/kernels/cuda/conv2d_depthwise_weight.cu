// Weight gradient of depthwise convolutions by 3x3 and 5x5 kernels: depthwise_tiles.cuh.
//
// All taps of a kernel are summed in registers, in one pass over the pixels: a thread reads a tile
// of gradients and the window of the source below it, and each element of the source meets all of
// its taps. In planes a block has a channel, in NHWC a thread 8 bytes of channels, as forward. The
// parts of the tiles are blocks with totals of their own. At two bytes an element a 3x3 kernel
// takes 15 to 17 instructions a gradient, where an H100 has time for 29 while it reads four bytes.
//
// A result that does not exist has no products: its gradient is zero, but the source may be
// infinite.
#include "kernels/cuda/depthwise_tiles.cuh"
#include "kernels/cuda/warp_sum.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kTileWarps = kTileThreads / 32;

// Of a multiprocessor, so that registers suffice.
template <class T>
constexpr int kWeightBlocks = T::kKernel == 3                          ? 5
                              : T::kKernel == 5 && T::kSourceStep == 1 ? 3
                                                                       : 2;
// In NHWC.
constexpr int kChannelWeightBlocks = 3;

// Where a tile's gradients lie, and how many of its results exist.
template <class T>
struct TileGradients {
  const T* first;
  int row_stride, pixel_stride;
  int rows, columns;
};

// Adds a tile's products to the sums of all taps. kAll: all of its results exist.
template <class T, class Tile, class Row, bool kAll, class A = Accumulator<T>>
__device__ inline void add_products(const TileGradients<T>& gradients,
                                    const typename Row::Place& place, const T* source,
                                    int row_stride, int first_row, int source_height,
                                    A (&sums)[Tile::kKernel][Tile::kKernel][Row::kChannels]) {
  constexpr int kVectors = Row::kWhole ? 1 : Tile::kWidth;
  constexpr int kVector = Row::kWhole ? Tile::kWidth : Row::kChannels;
  constexpr int kAhead = kRowsAhead<Tile, Row>;
  // Read as many rows ahead as the source, and widened once.
  Packed<T, kVector> vectors[Tile::kHeight][kVectors];
  A widened[Tile::kHeight][Tile::kWidth][Row::kChannels];
  const auto exists = [&](int y, int x) {
    return kAll || (y < gradients.rows && (Row::kWhole || x < gradients.columns));
  };
  const auto read = [&](int i) {
#pragma unroll
    for (int y = 0; y < Tile::kHeight; ++y) {
      if (Tile::tap(i, y) != 0) continue;
#pragma unroll
      for (int x = 0; x < kVectors; ++x) {
        vectors[y][x].read(gradients.first + y * gradients.row_stride + x * gradients.pixel_stride,
                           exists(y, x));
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read(i);
  for_each_row<T, Tile, Row>(
      place, source, row_stride, first_row, source_height,
      [&](int i, const A(&values)[Tile::kColumns][Row::kChannels]) {
        read(i + kAhead);
#pragma unroll
        for (int y = 0; y < Tile::kHeight; ++y) {
          if (!Tile::is_tap(Tile::tap(i, y))) continue;
          auto& row_sums = sums[Tile::tap(i, y)];
#pragma unroll
          for (int x = 0; x < Tile::kWidth; ++x) {
#pragma unroll
            for (int v = 0; v < Row::kChannels; ++v) {
              if (Tile::tap(i, y) == 0) {
                widened[y][x][v] =
                    Row::kWhole ? vectors[y][0].at(x) : vectors[y][x % kVectors].at(v);
              }
            }
            if (!exists(y, x)) continue;
#pragma unroll
            for (int j = 0; j < Tile::kColumns; ++j) {
              if (!Tile::is_tap(Tile::tap(j, x))) continue;
#pragma unroll
              for (int v = 0; v < Row::kChannels; ++v) {
                row_sums[Tile::tap(j, x)][v] += widened[y][x][v] * values[j][v];
              }
            }
          }
        }
      });
}

// The same of the tile whose first result is `at` of an image.
template <class T, class Tile, class Row, class A = Accumulator<T>>
__device__ inline void add_tile(const DepthwiseTiles& g, int pixel_stride, const T* gradient,
                                const T* source, FirstResult at,
                                A (&sums)[Tile::kKernel][Tile::kKernel][Row::kChannels]) {
  const int row_stride = g.result_width * pixel_stride;
  const TileGradients<T> gradients = {gradient + int64_t{at.y} * row_stride + at.x * pixel_stride,
                                      row_stride, pixel_stride, g.result_height - at.y,
                                      g.result_width - at.x};
  const typename Row::Place place(at.x, g.first_column, pixel_stride, g.source_width);
  const auto add = [&](auto all) {
    add_products<T, Tile, Row, decltype(all)::value>(
        gradients, place, source, g.source_width * pixel_stride, Tile::source(at.y, g.first_row),
        g.source_height, sums);
  };
  if (gradients.rows >= Tile::kHeight && (Row::kWhole || gradients.columns >= Tile::kWidth)) {
    add(std::true_type{});
  } else {
    add(std::false_type{});
  }
}

// totals[part][channel][tap]. A block has the channel blockIdx.x of part blockIdx.y.
template <class T, class Tile, class Row>
__global__ void __launch_bounds__(kTileThreads, kWeightBlocks<Tile>)
    plane_weight_kernel(const __grid_constant__ DepthwiseTiles g, const T* __restrict__ gradient,
                        const T* __restrict__ source, Accumulator<T>* totals,
                        uint32_t tiles_per_part) {
  using A = Accumulator<T>;
  constexpr int kTaps = Tile::kKernel * Tile::kKernel;
  CNNK_SHARED(A, of_warps, kTileWarps * kTaps);
  const int all_channels = static_cast<int>(blockIdx.x);
  const int group = all_channels / g.result_channels;
  const uint32_t tiles = g.images * g.plane_tiles.value;
  const uint32_t begin = blockIdx.y * tiles_per_part;
  const uint32_t end = begin + tiles_per_part < tiles ? begin + tiles_per_part : tiles;
  const int result_pixels = g.result_height * g.result_width;
  const int source_pixels = g.source_height * g.source_width;
  A sums[Tile::kKernel][Tile::kKernel][1] = {};
  for (uint32_t index = begin + threadIdx.x; index < end; index += kTileThreads) {
    const uint32_t image = g.plane_tiles.quotient(index);
    const FirstResult at = Tile::first_result(g, index - image * g.plane_tiles.value);
    add_tile<T, Tile, Row>(
        g, 1, gradient + (int64_t{image} * g.all_channels.value + all_channels) * result_pixels,
        source + (int64_t{image} * g.groups + group) * source_pixels, at, sums);
  }
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const A sum = warp_sum(sums[t / Tile::kKernel][t % Tile::kKernel][0]);
    if (thread % 32 == 0) of_warps[thread / 32 * kTaps + t] = sum;
  }
  __syncthreads();
  if (thread < kTaps) {
    A sum = of_warps[thread];
#pragma unroll
    for (int warp = 1; warp < kTileWarps; ++warp) sum += of_warps[warp * kTaps + thread];
    totals[(int64_t{blockIdx.y} * g.all_channels.value + all_channels) * kTaps + thread] = sum;
  }
}

// NHWC. Threads: x channels, in vectors; y tiles. The sums of a block's threads y meet in shared
// memory, one row of taps after the other.
template <class T, class Tile, class Row>
__global__ void __launch_bounds__(kTileThreads, kChannelWeightBlocks)
    channel_weight_kernel(const __grid_constant__ DepthwiseTiles g, const T* __restrict__ gradient,
                          const T* __restrict__ source, Accumulator<T>* totals,
                          uint32_t tiles_per_part) {
  using A = Accumulator<T>;
  constexpr int kVector = Row::kChannels;
  constexpr int kTaps = Tile::kKernel * Tile::kKernel;
  CNNK_SHARED(A, of_threads, kTileThreads * kVector * Tile::kKernel);  // [y][tap][channel]
  const int block_channels = static_cast<int>(blockDim.x) * kVector;
  const int first_channel = static_cast<int>(blockIdx.x) * block_channels;
  const int in_block = static_cast<int>(threadIdx.x) * kVector;
  const int channel = first_channel + in_block;
  const uint32_t tiles = g.images * g.plane_tiles.value;
  const uint32_t begin = blockIdx.y * tiles_per_part;
  uint32_t end = begin + tiles_per_part < tiles ? begin + tiles_per_part : tiles;
  if (channel >= g.groups) end = 0;
  const int result_pixels = g.result_height * g.result_width;
  const int source_pixels = g.source_height * g.source_width;
  A sums[Tile::kKernel][Tile::kKernel][kVector] = {};
  for (uint32_t index = begin + threadIdx.y; index < end; index += blockDim.y) {
    const uint32_t image = g.plane_tiles.quotient(index);
    const FirstResult at = Tile::first_result(g, index - image * g.plane_tiles.value);
    add_tile<T, Tile, Row>(g, g.groups,
                           gradient + int64_t{image} * result_pixels * g.groups + channel,
                           source + int64_t{image} * source_pixels * g.groups + channel, at, sums);
  }
  // block_channels is a power of two, of kTileThreads at most.
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int own_tap = thread / block_channels, own_channel = thread % block_channels;
  const int row_sums = Tile::kKernel * block_channels;
  A* const own_sums = &of_threads[static_cast<int>(threadIdx.y) * row_sums + in_block];
  A* const own_total =
      totals + (int64_t{blockIdx.y} * g.groups + first_channel + own_channel) * kTaps;
#pragma unroll
  for (int r = 0; r < Tile::kKernel; ++r) {
#pragma unroll
    for (int s = 0; s < Tile::kKernel; ++s) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) own_sums[s * block_channels + v] = sums[r][s][v];
    }
    __syncthreads();  // the row's sums are written
    if (first_channel + own_channel < g.groups) {
#pragma unroll 1
      for (int s = own_tap; s < Tile::kKernel; s += kTileThreads / block_channels) {
        A sum = 0;
#pragma unroll 1
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
          sum += of_threads[y * row_sums + s * block_channels + own_channel];
        }
        own_total[r * Tile::kKernel + s] = sum;
      }
    }
    __syncthreads();  // they are read, and the next row may write
  }
}

struct Tensors {
  const void *gradient, *source;
  void* totals;
  int parts;
};

template <class T, class Kernel>
Error launch_parts(Kernel kernel, LaunchGrid grid, const DepthwiseTiles& tiles, const Tensors& of,
                   Stream stream) {
  grid.y = static_cast<unsigned>(of.parts);
  const int64_t all = int64_t{tiles.images} * tiles.plane_tiles.value;
  return launch(kernel, grid, 0, stream, tiles, static_cast<const T*>(of.gradient),
                static_cast<const T*>(of.source), static_cast<Accumulator<T>*>(of.totals),
                static_cast<uint32_t>(ceil_div(all, of.parts)));
}

template <class T, class Tile, class Row>
Error launch_planes(DepthwiseTiles tiles, const Tensors& of, Stream stream) {
  tiles.cut(Tile::kHeight, Tile::kWidth);
  LaunchGrid grid;
  grid.block_x = kTileThreads;
  grid.x = tiles.all_channels.value;
  return launch_parts<T>(plane_weight_kernel<T, Tile, Row>, grid, tiles, of, stream);
}

template <class T, class Tile>
Error launch_channels(DepthwiseTiles tiles, const Tensors& of, Stream stream) {
  using Row = PixelRow<T, Tile, depthwise_vector_channels(Tile::kKernel, sizeof(T))>;
  tiles.cut(Tile::kHeight, Tile::kWidth);
  LaunchGrid grid;
  grid.block_x = static_cast<unsigned>(depthwise_lanes(tiles.groups / Row::kChannels));
  grid.block_y = kTileThreads / grid.block_x;
  grid.x = static_cast<unsigned>(ceil_div(tiles.groups, int64_t{grid.block_x} * Row::kChannels));
  return launch_parts<T>(channel_weight_kernel<T, Tile, Row>, grid, tiles, of, stream);
}

template <class T, int kKernel, int kStep>
Error launch_kernel(const DepthwiseTiles& tiles, const Tensors& of, Stream stream) {
  constexpr int kWide = widest_own_columns(kKernel, kStep, false, sizeof(T));
  constexpr int kNarrow = narrow_own_columns(false);
  constexpr int kHeight = 7;  // planes of 7, 14, 28, 56 and 112 rows are whole tiles
  if (tiles.channels_last) {
    using Channels = Tile<kKernel, kStep, false, kStep == 2 ? 4 : kHeight, 2>;
    return launch_channels<T, Channels>(tiles, of, stream);
  }
  if (tiles.own_columns == kWide) {
    using Wide = Tile<kKernel, kStep, false, kHeight, kWide / kStep>;
    return launch_planes<T, Wide, PlaneRow<T, Wide, kWide>>(tiles, of, stream);
  }
  if constexpr (kNarrow < kWide) {
    if (tiles.own_columns == kNarrow) {
      using Narrow = Tile<kKernel, kStep, false, kHeight, kNarrow / kStep>;
      return launch_planes<T, Narrow, PlaneRow<T, Narrow, kNarrow>>(tiles, of, stream);
    }
  }
  using Single = Tile<kKernel, kStep, false, kHeight, 2>;
  return launch_planes<T, Single, PixelRow<T, Single, 1>>(tiles, of, stream);
}

template <class T>
Error launch_type(const DepthwiseTiles& tiles, const Tensors& of, Stream stream) {
  if (tiles.source_step == 2) {
    return tiles.kernel == 3 ? launch_kernel<T, 3, 2>(tiles, of, stream)
                             : launch_kernel<T, 5, 2>(tiles, of, stream);
  }
  return tiles.kernel == 3 ? launch_kernel<T, 3, 1>(tiles, of, stream)
                           : launch_kernel<T, 5, 1>(tiles, of, stream);
}

}  // namespace

Error depthwise_tiles_weight_totals(DType dtype, const DepthwiseTiles& tiles, int parts,
                                    const void* gradient, const void* source, void* totals,
                                    Stream stream) {
  const Tensors of = {gradient, source, totals, parts};
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    // Plans give these kernels no float64.
    if constexpr (!std::is_same_v<T, double>) error = launch_type<T>(tiles, of, stream);
  });
  return error;
}

}  // namespace cnnkernels::cuda
