// Depthwise convolution by 3x3 and 5x5 kernels, forward and input gradient:
// depthwise_tiles.cuh.
//
// In planes a thread has the pixels of an access of 16 bytes in seven rows, of which 7, 14, 28, 56
// and 112 are multiples: a 3x3 kernel reads nine rows with a neighbour on either side, 27 accesses
// for 56 results of 16 bits, and takes 17 instructions a result, of which 9 are the products. At
// the rate of a copy an H100 has time for 29. Rows of 28 and 14 pixels have narrower accesses, and
// those that are not aligned have their pixels one by one, two a thread, so that stores of a warp
// stay together. Lanes of a warp lie along a row, then along the rows of the plane, then the
// planes.
//
// In NHWC a thread has 8 bytes of channels of 4x4 pixels, and 16 lanes 128 bytes of channels: the
// window of a 3x3 kernel is 36 accesses for 64 results of 16 bits, 19 instructions a result. The
// block's weights come through shared memory.
//
// The input gradient at stride 1 is a turned kernel. At stride 2 a tile has its four residue
// classes, which share the source pixels and are written side by side.
#include "kernels/cuda/depthwise_tiles.cuh"

namespace cnnkernels::cuda {
namespace {

// Of a multiprocessor, so that registers suffice: in planes, and in NHWC.
template <class T>
constexpr int kPlaneBlocks = T::kKernel == 3 ? 5 : 4;
template <class T>
constexpr int kChannelBlocks = T::kSourceStep * T::kKernel == 10 ? 2 : 3;

// A gradient has no ReLU.
template <class Tile, class A>
__device__ inline A finished(A sum, bool relu) {
  return !Tile::kTransposed && relu && sum < A{0} ? A{0} : sum;  // and NaN stays
}

// Sums a tile's products, which begin at `added`, and calls store(y, sums of row y) as soon as a
// row is complete, so that few sums are under way.
template <class T, class Tile, class Row, class Store, class A = Accumulator<T>>
__device__ inline void sum_products(
    const typename Row::Place& place, const T* source, int row_stride, int first_row,
    int source_height, const A (&weights)[Tile::kKernel][Tile::kKernel][Row::kChannels],
    const A (&added)[Row::kChannels], Store&& store) {
  A sums[Tile::kHeight][Tile::kWidth][Row::kChannels];
#pragma unroll
  for (int y = 0; y < Tile::kHeight; ++y) {
#pragma unroll
    for (int x = 0; x < Tile::kWidth; ++x) {
#pragma unroll
      for (int v = 0; v < Row::kChannels; ++v) sums[y][x][v] = added[v];
    }
  }
  for_each_row<T, Tile, Row>(place, source, row_stride, first_row, source_height,
                             [&](int i, const A(&values)[Tile::kColumns][Row::kChannels]) {
#pragma unroll
                               for (int y = 0; y < Tile::kHeight; ++y) {
                                 if (!Tile::is_tap(Tile::tap(i, y))) continue;
                                 const auto& row_weights = weights[Tile::tap(i, y)];
#pragma unroll
                                 for (int x = 0; x < Tile::kWidth; ++x) {
#pragma unroll
                                   for (int j = 0; j < Tile::kColumns; ++j) {
                                     if (!Tile::is_tap(Tile::tap(j, x))) continue;
#pragma unroll
                                     for (int v = 0; v < Row::kChannels; ++v) {
                                       sums[y][x][v] +=
                                           row_weights[Tile::tap(j, x)][v] * values[j][v];
                                     }
                                   }
                                 }
                                 if (Tile::is_last(i, y)) store(y, sums[y]);
                               }
                             });
}

template <class T, class Tile, class Row>
__global__ void __launch_bounds__(kTileThreads, kPlaneBlocks<Tile>)
    plane_tiles_kernel(const __grid_constant__ DepthwiseTiles g, const T* __restrict__ source,
                       const T* __restrict__ weight, const T* __restrict__ bias,
                       T* __restrict__ result, bool relu) {
  using A = Accumulator<T>;
  const uint32_t index = blockIdx.x * kTileThreads + threadIdx.x;
  const uint32_t plane = g.plane_tiles.quotient(index);
  const uint32_t image = g.all_channels.quotient(plane);
  if (image >= static_cast<uint32_t>(g.images)) return;
  const FirstResult at = Tile::first_result(g, index - plane * g.plane_tiles.value);
  const int y = at.y, x = at.x;
  const int all_channels = static_cast<int>(plane - image * g.all_channels.value);
  int group = all_channels, channel = 0;
  uint32_t source_plane = plane;
  if (g.result_channels > 1) {
    group = all_channels / g.result_channels;
    channel = all_channels % g.result_channels;
    source_plane = image * g.groups + group;
  }
  source += int64_t{source_plane} * (g.source_height * g.source_width);
  result += int64_t{plane} * (g.result_height * g.result_width);
  weight += group * g.weight_stride_group + channel * g.weight_stride_result + g.weight_first;
  A weights[Tile::kKernel][Tile::kKernel][1];
#pragma unroll
  for (int r = 0; r < Tile::kKernel; ++r) {
#pragma unroll
    for (int s = 0; s < Tile::kKernel; ++s) {
      weights[r][s][0] = to_accumulator(weight[r * g.weight_stride_r + s * g.weight_stride_s]);
    }
  }
  const A added[1] = {bias != nullptr ? to_accumulator(bias[all_channels]) : A{0}};

  const typename Row::Place place(x, g.first_column, 1, g.source_width);
  T* row = result + y * g.result_width + x;
  const auto store = [&](int i, const A(&sums)[Tile::kWidth][1]) {
    A finals[Tile::kWidth];
#pragma unroll
    for (int j = 0; j < Tile::kWidth; ++j) finals[j] = finished<Tile>(sums[j][0], relu);
    const auto values = from_accumulators<T>(finals);
    const bool exists = y + i < g.result_height;
    if constexpr (Row::kWhole) {
      store_where(exists, row, values);
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kWidth; ++j) {
        store_where(exists && x + j < g.result_width, row + j, Vector<T, 1>{values[j]});
      }
    }
    row += g.result_width;
  };
  sum_products<T, Tile, Row>(place, source, g.source_width, Tile::source(y, g.first_row),
                             g.source_height, weights, added, store);
}

// NHWC. Threads: x channels, in vectors; y tiles.
template <class T, class Tile, class Row>
__global__ void __launch_bounds__(kTileThreads, kChannelBlocks<Tile>)
    channel_tiles_kernel(const __grid_constant__ DepthwiseTiles g, const T* __restrict__ source,
                         const T* __restrict__ weight, const T* __restrict__ bias,
                         T* __restrict__ result, bool relu) {
  using A = Accumulator<T>;
  constexpr int kTaps = Tile::kKernel * Tile::kKernel;
  constexpr int kVector = Row::kChannels;
  CNNK_SHARED(A, shared_weights,
              kTaps * kMostDepthwiseLanes * kVector);  // [tap][channel of the block]
  const int block_channels = static_cast<int>(blockDim.x) * kVector;
  const int first_channel = static_cast<int>(blockIdx.y) * block_channels;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  // block_channels is a power of two, of 64 at most.
  const int weight_channel = first_channel + thread % block_channels;
  const T* const own_weight = weight + weight_channel * g.weight_stride_group + g.weight_first;
  for (int tap = thread / block_channels; tap < kTaps; tap += kTileThreads / block_channels) {
    Packed<T, 1> element;
    element.read(own_weight + tap / Tile::kKernel * g.weight_stride_r +
                     tap % Tile::kKernel * g.weight_stride_s,
                 weight_channel < g.groups);
    shared_weights[tap * block_channels + thread % block_channels] = element.at(0);
  }
  __syncthreads();

  const int in_block = static_cast<int>(threadIdx.x) * kVector;
  const int channel = first_channel + in_block;
  const uint32_t index = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t image = g.plane_tiles.quotient(index);
  if (channel >= g.groups || image >= static_cast<uint32_t>(g.images)) return;
  const FirstResult at = Tile::first_result(g, index - image * g.plane_tiles.value);
  const int y = at.y, x = at.x;
  source += int64_t{image} * (g.source_height * g.source_width) * g.groups + channel;
  result +=
      (int64_t{image} * (g.result_height * g.result_width) + y * g.result_width + x) * g.groups +
      channel;
  A weights[Tile::kKernel][Tile::kKernel][kVector];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const auto of_tap = load_vector<kVector>(&shared_weights[t * block_channels + in_block]);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      weights[t / Tile::kKernel][t % Tile::kKernel][v] = of_tap[v];
    }
  }

  A added[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    added[v] = bias != nullptr ? to_accumulator(bias[channel + v]) : A{0};
  }
  const typename Row::Place place(x, g.first_column, g.groups, g.source_width);
  const auto store = [&](int i, const A(&sums)[Tile::kWidth][kVector]) {
    const bool exists = y + i < g.result_height;
#pragma unroll
    for (int j = 0; j < Tile::kWidth; ++j) {
      A finals[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) finals[v] = finished<Tile>(sums[j][v], relu);
      store_where(exists && x + j < g.result_width, result + j * g.groups,
                  from_accumulators<T>(finals));
    }
    result += g.result_width * g.groups;
  };
  sum_products<T, Tile, Row>(place, source, g.source_width * g.groups, Tile::source(y, g.first_row),
                             g.source_height, weights, added, store);
}

struct Tensors {
  const void *source, *weight, *bias;
  void* result;
  bool relu;
};

template <class T, class Kernel>
Error launch_tiles(Kernel kernel, const LaunchGrid& grid, const DepthwiseTiles& tiles,
                   const Tensors& of, Stream stream) {
  return launch(kernel, grid, 0, stream, tiles, static_cast<const T*>(of.source),
                static_cast<const T*>(of.weight), static_cast<const T*>(of.bias),
                static_cast<T*>(of.result), of.relu);
}

template <class T, class Tile, class Row>
Error launch_planes(DepthwiseTiles tiles, const Tensors& of, Stream stream) {
  tiles.cut(Tile::kHeight, Tile::kWidth);
  LaunchGrid grid;
  grid.block_x = kTileThreads;
  grid.x = static_cast<unsigned>(ceil_div(
      int64_t{tiles.images} * tiles.all_channels.value * tiles.plane_tiles.value, kTileThreads));
  return launch_tiles<T>(plane_tiles_kernel<T, Tile, Row>, grid, tiles, of, stream);
}

template <class T, class Tile>
Error launch_channels(DepthwiseTiles tiles, const Tensors& of, Stream stream) {
  using Row = PixelRow<T, Tile, depthwise_vector_channels(Tile::kKernel, sizeof(T))>;
  tiles.cut(Tile::kHeight, Tile::kWidth);
  LaunchGrid grid;
  grid.block_x = static_cast<unsigned>(depthwise_lanes(tiles.groups / Row::kChannels));
  grid.block_y = kTileThreads / grid.block_x;
  grid.x = static_cast<unsigned>(
      ceil_div(int64_t{tiles.images} * tiles.plane_tiles.value, grid.block_y));
  grid.y = static_cast<unsigned>(ceil_div(tiles.groups, int64_t{grid.block_x} * Row::kChannels));
  return launch_tiles<T>(channel_tiles_kernel<T, Tile, Row>, grid, tiles, of, stream);
}

template <class T, int kKernel, int kStep, bool kTransposed>
Error launch_kernel(const DepthwiseTiles& tiles, const Tensors& of, Stream stream) {
  constexpr int kWide = widest_own_columns(kKernel, kStep, kTransposed, sizeof(T));
  constexpr int kNarrow = narrow_own_columns(kTransposed);
  constexpr auto results = [](int own) { return kTransposed ? 2 * own : own / kStep; };
  // Planes of 7, 14, 28, 56 and 112 rows are whole tiles.
  constexpr int kPlaneHeight = kTransposed ? 14 : 7;
  if (tiles.channels_last) {
    constexpr int kHeight = 4, kWidth = kStep == 2 ? 2 : 4;
    return launch_channels<T, Tile<kKernel, kStep, kTransposed, kHeight, kWidth>>(tiles, of,
                                                                                  stream);
  }
  const auto launch_own = [&](auto own, auto height) {
    constexpr int kOwn = decltype(own)::value;
    using Own = Tile<kKernel, kStep, kTransposed, decltype(height)::value, results(kOwn)>;
    return launch_planes<T, Own, PlaneRow<T, Own, kOwn>>(tiles, of, stream);
  };
  using Height = std::integral_constant<int, kPlaneHeight>;
  if (tiles.own_columns == kWide) return launch_own(std::integral_constant<int, kWide>{}, Height{});
  if constexpr (kNarrow < kWide) {
    if (tiles.own_columns == kNarrow) {
      return launch_own(std::integral_constant<int, kNarrow>{}, Height{});
    }
  }
  if constexpr (has_paired_columns(kStep, kTransposed)) {
    if (tiles.own_columns == 2) {
      return launch_own(std::integral_constant<int, 2>{},
                        std::integral_constant<int, 2 * kPlaneHeight>{});
    }
  }
  using Single = Tile<kKernel, kStep, kTransposed, kPlaneHeight, 2>;
  return launch_planes<T, Single, PixelRow<T, Single, 1>>(tiles, of, stream);
}

template <class T>
Error launch_type(const DepthwiseTiles& tiles, const Tensors& of, Stream stream) {
  if (tiles.transposed) {
    return tiles.kernel == 3 ? launch_kernel<T, 3, 1, true>(tiles, of, stream)
                             : launch_kernel<T, 5, 1, true>(tiles, of, stream);
  }
  if (tiles.source_step == 2) {
    return tiles.kernel == 3 ? launch_kernel<T, 3, 2, false>(tiles, of, stream)
                             : launch_kernel<T, 5, 2, false>(tiles, of, stream);
  }
  return tiles.kernel == 3 ? launch_kernel<T, 3, 1, false>(tiles, of, stream)
                           : launch_kernel<T, 5, 1, false>(tiles, of, stream);
}

}  // namespace

Error depthwise_tiles_pass(DType dtype, const DepthwiseTiles& tiles, const void* source,
                           const void* weight, const void* bias, void* result, bool relu,
                           Stream stream) {
  const Tensors of = {source, weight, bias, result, relu};
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    // Plans give these kernels no float64.
    if constexpr (!std::is_same_v<T, double>) error = launch_type<T>(tiles, of, stream);
  });
  return error;
}

}  // namespace cnnkernels::cuda
