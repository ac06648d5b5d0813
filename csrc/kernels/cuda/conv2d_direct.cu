// Direct convolution, forward and input gradient: first layers, and what tensor cores do not take.
//
// A thread sums kPixels pixels of kChannels result channels in registers. Weights lie in shared
// memory in the type of the sums, [tap, source channel][result channel], so that all threads of a
// warp read the same 16 bytes at once: two pixels by sixteen channels are 32 multiply-adds for four
// such reads and two elements of the source. A first layer's filter fits whole; a deeper one comes
// in slices. The source is read where it lies: the threads of a warp take neighbouring pixels, and
// the taps of a pixel meet those of its neighbours in the first-level cache. Bias and ReLU are
// applied to the sums.
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/elements.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kDirectThreads = 128;
constexpr int kDirectBlocks = 3;  // of a multiprocessor: up to 168 registers a thread
constexpr int kPixels = 2;
constexpr int kTilePixels = kPixels * kDirectThreads;
constexpr int kSliceBytes = 32 * 1024;

template <class T, int kChannels>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    direct_kernel(const __grid_constant__ ConvolutionPass pass, const T* source, const T* weight,
                  const T* bias, T* result, bool relu) {
  using A = Accumulator<T>;
  constexpr int kSlice = kSliceBytes / (kChannels * static_cast<int>(sizeof(A)));
  CNNK_SHARED(A, weights, kSlice * kChannels);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.z);
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const int channels = pass.result_channels - first_channel < kChannels
                           ? pass.result_channels - first_channel
                           : kChannels;
  const PassPhase& phase = phase_of_tile(pass, static_cast<int>(blockIdx.x));
  const int first_position = (static_cast<int>(blockIdx.x) - phase.first_tile) * kTilePixels;
  PassPosition at[kPixels];
  A sums[kPixels][kChannels];
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    at[u] = pass_position(pass, phase, first_position + u * kDirectThreads + thread);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sums[u][k] = 0;
  }
  source += group * pass.source_channels * pass.source_stride_c;
  weight += group * pass.weight_stride_group + first_channel * pass.weight_stride_result;

  const int depth = phase.taps * pass.source_channels;
  for (int first = 0; first < depth; first += kSlice) {
    const int count = depth - first < kSlice ? depth - first : kSlice;
    __syncthreads();  // the slice before is multiplied
    for (int e = thread; e < count * kChannels; e += kDirectThreads) {
      const int d = first + e / kChannels, k = e % kChannels;
      const PassTap tap = pass.taps[phase.first_tap + d / pass.source_channels];
      const int c = d % pass.source_channels;
      weights[e] =
          k < channels
              ? to_accumulator(weight[k * pass.weight_stride_result +
                                      c * pass.weight_stride_source + tap_weight(pass, tap)])
              : A{0};
    }
    __syncthreads();
    int t = phase.first_tap + first / pass.source_channels, c = first % pass.source_channels;
    for (int d = 0; d < count; ++t, c = 0) {
      const PassTap tap = pass.taps[t];
      const T* elements[kPixels];
      bool inside[kPixels];
#pragma unroll
      for (int u = 0; u < kPixels; ++u) {
        inside[u] = tap_is_inside(pass, at[u], tap);
        elements[u] = source + tap_element(pass, at[u], tap) + c * pass.source_stride_c;
      }
      const int end = d + pass.source_channels - c < count ? d + pass.source_channels - c : count;
      for (; d < end; ++d) {
        A values[kPixels];
#pragma unroll
        for (int u = 0; u < kPixels; ++u) {
          values[u] = inside[u] ? to_accumulator(*elements[u]) : A{0};
          elements[u] += pass.source_stride_c;
        }
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          const A factor = weights[d * kChannels + k];
#pragma unroll
          for (int u = 0; u < kPixels; ++u) sums[u][k] += values[u] * factor;
        }
      }
    }
  }

  const int channel0 = group * pass.result_channels + first_channel;
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    if (!at[u].exists) continue;
    T* const pixel = result + at[u].result + channel0 * pass.result_stride_c;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      if (k >= channels) break;
      A sum = sums[u][k];
      if (bias != nullptr) sum += to_accumulator(bias[channel0 + k]);
      if (relu) sum = sum < A{0} ? A{0} : sum;  // and NaN stays
      pixel[k * pass.result_stride_c] = from_accumulator<T>(sum);
    }
  }
}

template <class T, int kChannels>
Error launch_direct(ConvolutionPass& pass, const void* source, const void* weight, const void* bias,
                    void* result, bool relu, Stream stream) {
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(number_tiles(pass, kTilePixels));
  grid.y = static_cast<unsigned>(ceil_div(pass.result_channels, kChannels));
  grid.z = static_cast<unsigned>(pass.groups);
  grid.block_x = kDirectThreads;
  return launch(direct_kernel<T, kChannels>, grid, 0, stream, pass, static_cast<const T*>(source),
                static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(result),
                relu);
}

}  // namespace

Error direct_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                  const void* bias, void* result, bool relu, Stream stream) {
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    // Sixteen doubles of two pixels are more registers than a thread has.
    constexpr int kMany = sizeof(T) == 8 ? 8 : 16;
    error = pass.result_channels <= 8
                ? launch_direct<T, 8>(pass, source, weight, bias, result, relu, stream)
                : launch_direct<T, kMany>(pass, source, weight, bias, result, relu, stream);
  });
  return error;
}

}  // namespace cnnkernels::cuda
