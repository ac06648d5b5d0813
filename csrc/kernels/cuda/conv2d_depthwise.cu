// Convolution of one channel a group, or few: forward, input gradient and weight gradient.
//
// There is next to nothing to sum over but the taps, so that memory is the limit. The common
// kernels have kernels of their own, which make tiles: depthwise_tiles.h. Those here are for all
// others: groups of some channels, dilations, other kernels and strides, float64. In planes (NCHW)
// a block has one result channel of a group: its weights lie in shared memory, its threads take
// neighbouring pixels, and the taps that pixels share meet in the first-level cache. In NHWC, with
// one channel a group, a thread has 16 bytes of channels of four neighbouring pixels: for each tap
// one vector of weights, from shared memory, serves four of the source.
//
// The weight gradient goes over the pixels once for each tap, from the caches after the first: a
// sum for each tap would be as many registers. Parts of the pixels have totals of their own.
#include <algorithm>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/depthwise_tiles.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/warp_sum.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kDepthwiseThreads = 256;
constexpr int kDepthwiseBlocks = 2;  // of a multiprocessor: 128 registers a thread
constexpr int kPixels = 4;
constexpr int kTilePixels = kPixels * kDepthwiseThreads;

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks)
    planes_kernel(const __grid_constant__ ConvolutionPass pass, const T* source, const T* weight,
                  const T* bias, T* result, bool relu) {
  using A = Accumulator<T>;
  CNNK_SHARED(A, weights, kMostDepthwiseWeights);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.y) / pass.result_channels;
  const int channel = static_cast<int>(blockIdx.y) % pass.result_channels;
  const PassPhase& phase = phase_of_tile(pass, static_cast<int>(blockIdx.x));
  const int first_position = (static_cast<int>(blockIdx.x) - phase.first_tile) * kTilePixels;
  source += int64_t{group} * pass.source_channels * pass.source_stride_c;
  weight += group * pass.weight_stride_group + channel * pass.weight_stride_result;
  for (int d = thread; d < phase.taps * pass.source_channels; d += kDepthwiseThreads) {
    const PassTap tap = pass.taps[phase.first_tap + d / pass.source_channels];
    weights[d] = to_accumulator(
        weight[d % pass.source_channels * pass.weight_stride_source + tap_weight(pass, tap)]);
  }
  __syncthreads();

  PassPosition at[kPixels];
  A sums[kPixels] = {};
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    at[u] = pass_position(pass, phase, first_position + u * kDepthwiseThreads + thread);
  }
  int d = 0;
  for (int t = 0; t < phase.taps; ++t) {
    const PassTap tap = pass.taps[phase.first_tap + t];
    for (int c = 0; c < pass.source_channels; ++c, ++d) {
      const A factor = weights[d];
#pragma unroll
      for (int u = 0; u < kPixels; ++u) {
        const bool inside = tap_is_inside(pass, at[u], tap);
        const int64_t element = tap_element(pass, at[u], tap) + c * pass.source_stride_c;
        sums[u] += factor * (inside ? to_accumulator(source[element]) : A{0});
      }
    }
  }
  const int all_channels = group * pass.result_channels + channel;
  const A added = bias != nullptr ? to_accumulator(bias[all_channels]) : A{0};
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    if (!at[u].exists) continue;
    A sum = sums[u] + added;
    if (relu) sum = sum < A{0} ? A{0} : sum;  // and NaN stays
    result[at[u].result + all_channels * pass.result_stride_c] = from_accumulator<T>(sum);
  }
}

// NHWC, one channel a group. Threads: x channels, in vectors; y pixels.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks)
    channels_kernel(const __grid_constant__ ConvolutionPass pass, const T* source, const T* weight,
                    const T* bias, T* result, bool relu) {
  using A = Accumulator<T>;
  CNNK_SHARED(A, weights, kMostDepthwiseWeights);  // [tap][channel of the block]
  const int block_channels = static_cast<int>(blockDim.x) * kWidth;
  const int first_channel = static_cast<int>(blockIdx.y) * block_channels;
  const PassPhase& phase = phase_of_tile(pass, static_cast<int>(blockIdx.x));
  const int tile_pixels = static_cast<int>(blockDim.y) * kPixels;
  const int first_position = (static_cast<int>(blockIdx.x) - phase.first_tile) * tile_pixels +
                             static_cast<int>(threadIdx.y) * kPixels;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int d = thread; d < phase.taps * block_channels; d += kDepthwiseThreads) {
    const int channel = first_channel + d % block_channels;
    const PassTap tap = pass.taps[phase.first_tap + d / block_channels];
    weights[d] =
        channel < pass.groups
            ? to_accumulator(weight[channel * pass.weight_stride_group + tap_weight(pass, tap)])
            : A{0};
  }
  __syncthreads();

  const int in_block = static_cast<int>(threadIdx.x) * kWidth;
  const int channel = first_channel + in_block;
  if (channel >= pass.groups) return;
  PassPosition at[kPixels];
  A sums[kPixels][kWidth] = {};
#pragma unroll
  for (int u = 0; u < kPixels; ++u) at[u] = pass_position(pass, phase, first_position + u);
  for (int t = 0; t < phase.taps; ++t) {
    const PassTap tap = pass.taps[phase.first_tap + t];
    A factors[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) factors[v] = weights[t * block_channels + in_block + v];
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
      Vector<T, kWidth> elements = {};
      if (tap_is_inside(pass, at[u], tap)) {
        elements = load_vector<kWidth>(source + tap_element(pass, at[u], tap) + channel);
      }
#pragma unroll
      for (int v = 0; v < kWidth; ++v) sums[u][v] += factors[v] * to_accumulator(elements[v]);
    }
  }
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    if (!at[u].exists) continue;
    Vector<T, kWidth> values;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      A sum = sums[u][v];
      if (bias != nullptr) sum += to_accumulator(bias[channel + v]);
      if (relu) sum = sum < A{0} ? A{0} : sum;
      values[v] = from_accumulator<T>(sum);
    }
    store_vector<kWidth>(result + at[u].result + channel, values);
  }
}

// totals[part][weight], in the order of weight_gradient's sums. A block has one source channel of
// one output channel; blockIdx.y is its part.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks)
    depthwise_weight_gradient_kernel(const __grid_constant__ ConvolutionPass pass,
                                     const T* gradient, const T* source, Accumulator<T>* totals,
                                     int positions_per_part) {
  using A = Accumulator<T>;
  constexpr int kWarps = kDepthwiseThreads / 32;
  CNNK_SHARED(A, of_warps, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  const int c = static_cast<int>(blockIdx.x) % pass.source_channels;
  const int all_channels = static_cast<int>(blockIdx.x) / pass.source_channels;
  const int group = all_channels / pass.result_channels;
  const PassPhase& phase = pass.phases[0];
  const int positions = pass.images * phase.rows * phase.columns;
  const int begin = static_cast<int>(blockIdx.y) * positions_per_part;
  const int end = positions - begin < positions_per_part ? positions : begin + positions_per_part;
  gradient += all_channels * pass.result_stride_c;
  source += (int64_t{group} * pass.source_channels + c) * pass.source_stride_c;
  A* const of_part =
      totals + (int64_t{blockIdx.y} * pass.groups * pass.result_channels + all_channels) *
                   phase.taps * pass.source_channels;
  for (int t = 0; t < phase.taps; ++t) {
    const PassTap tap = pass.taps[t];
    A sum = 0;
    for (int position = begin + thread; position < end; position += kDepthwiseThreads) {
      const PassPosition at = pass_position(pass, phase, position);
      const A value =
          tap_is_inside(pass, at, tap) ? to_accumulator(source[tap_element(pass, at, tap)]) : A{0};
      sum += to_accumulator(gradient[at.result]) * value;
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) of_warps[thread / 32] = sum;
    __syncthreads();  // all sums are written
    if (thread < 32) {
      sum = warp_sum(thread < kWarps ? of_warps[thread] : A{0});
      if (thread == 0) of_part[t * pass.source_channels + c] = sum;
    }
    __syncthreads();  // all sums are read, and the next tap may write
  }
}

template <class T>
Error launch_planes(ConvolutionPass& pass, const void* source, const void* weight, const void* bias,
                    void* result, bool relu, Stream stream) {
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(number_tiles(pass, kTilePixels));
  grid.y = static_cast<unsigned>(pass.groups * pass.result_channels);
  grid.block_x = kDepthwiseThreads;
  return launch(planes_kernel<T>, grid, 0, stream, pass, static_cast<const T*>(source),
                static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(result),
                relu);
}

// Vectors of channels of channels_kernel's block: the widest that keeps its weights in shared
// memory, and half of its threads busy.
int block_vectors(const ConvolutionPass& pass, int64_t element_bytes) {
  const int64_t width = kVectorBytes / element_bytes;
  int vectors = 32;
  while (vectors > 1 && (vectors * width * pass.kernel_taps() > kMostDepthwiseWeights ||
                         vectors * width >= 2 * pass.groups)) {
    vectors /= 2;
  }
  return vectors;
}

template <class T>
Error launch_channels(ConvolutionPass& pass, const void* source, const void* weight,
                      const void* bias, void* result, bool relu, Stream stream) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  LaunchGrid grid;
  grid.block_x = static_cast<unsigned>(block_vectors(pass, sizeof(T)));
  grid.block_y = kDepthwiseThreads / grid.block_x;
  grid.x = static_cast<unsigned>(number_tiles(pass, static_cast<int>(grid.block_y) * kPixels));
  grid.y = static_cast<unsigned>(ceil_div(pass.groups, int64_t{grid.block_x} * kWidth));
  return launch(channels_kernel<T, kWidth>, grid, 0, stream, pass, static_cast<const T*>(source),
                static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(result),
                relu);
}

// Whether channels_kernel takes a pass.
bool channels_apply(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment) {
  return pass.source_channels == 1 && pass.result_channels == 1 && pass.source_stride_c == 1 &&
         pass.source_stride_w == pass.groups && pass.groups * element_bytes % kVectorBytes == 0 &&
         alignment % kVectorBytes == 0 &&
         kVectorBytes / element_bytes * pass.kernel_taps() <= kMostDepthwiseWeights;
}

// Of two addresses, in bytes, but for what no access needs.
int64_t common_alignment(const void* a, const void* b) {
  const uintptr_t bits =
      reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | kVectorBytes;
  return static_cast<int64_t>(bits & (~bits + 1));
}

}  // namespace

Error depthwise_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                     const void* bias, void* result, bool relu, Stream stream) {
  const int64_t alignment = common_alignment(source, result);
  if (const auto tiles = depthwise_tiles(pass, dtype, alignment)) {
    return depthwise_tiles_pass(dtype, *tiles, source, weight, bias, result, relu, stream);
  }
  const bool channels = channels_apply(pass, element_size(dtype), alignment);
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    error = channels ? launch_channels<T>(pass, source, weight, bias, result, relu, stream)
                     : launch_planes<T>(pass, source, weight, bias, result, relu, stream);
  });
  return error;
}

int depthwise_weight_parts(DType dtype, const ConvolutionPass& pass, int multiprocessors) {
  constexpr int64_t kBlocks = 6;         // of a multiprocessor
  constexpr int64_t kThreadPixels = 64;  // a tile of most kernels
  const int64_t channels = int64_t{pass.groups} * pass.result_channels * pass.source_channels;
  const int64_t pixels = int64_t{pass.images} * pass.phases[0].rows * pass.phases[0].columns;
  int64_t blocks = channels, block_pixels = kDepthwiseThreads * kThreadPixels;
  const auto tiles = depthwise_tiles(pass, dtype, kVectorBytes);
  if (tiles && tiles->channels_last) {
    const int64_t vectors =
        channels / depthwise_vector_channels(tiles->kernel, element_size(dtype));
    const int64_t lanes = depthwise_lanes(static_cast<int>(vectors));
    blocks = ceil_div(vectors, lanes);
    block_pixels = kTileThreads / lanes * kThreadPixels;
  }
  const int64_t wanted = ceil_div(kBlocks * multiprocessors, blocks);
  return static_cast<int>(std::max(int64_t{1}, std::min(wanted, pixels / block_pixels)));
}

Error depthwise_weight_totals(DType dtype, const ConvolutionPass& pass, int parts,
                              const void* gradient, const void* source, void* totals,
                              Stream stream) {
  if (const auto tiles = depthwise_tiles(pass, dtype, common_alignment(source, gradient))) {
    return depthwise_tiles_weight_totals(dtype, *tiles, parts, gradient, source, totals, stream);
  }
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    LaunchGrid grid;
    grid.x = static_cast<unsigned>(pass.groups * pass.result_channels * pass.source_channels);
    grid.y = static_cast<unsigned>(parts);
    grid.block_x = kDepthwiseThreads;
    error = launch(depthwise_weight_gradient_kernel<T>, grid, 0, stream, pass,
                   static_cast<const T*>(gradient), static_cast<const T*>(source),
                   static_cast<Accumulator<T>*>(totals), positions_of_part(pass, parts));
  });
  return error;
}

}  // namespace cnnkernels::cuda
