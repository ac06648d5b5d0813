// The gradient of the bias: a sum over all pixels of each channel.
//
// A block has 32 channels and eight warps. In NHWC a lane is a channel, and warps take turns over
// the pixels; in NCHW a warp has four of the channels, one after the other, and its lanes are
// neighbouring pixels. Parts of the pixels have totals of their own, which a second pass adds up in
// their order.
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/warp_sum.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kChannels = 32, kWarps = 8, kThreads = 32 * kWarps;

// totals[part][channel] of gradients[image][pixel, channel], where the channel has the stride given
// and a pixel that of the other order.
template <class T, bool kPixelsFirst>
__global__ void __launch_bounds__(kThreads)
    bias_totals_kernel(const T* gradient, Accumulator<T>* totals, int64_t images, int64_t pixels,
                       int channels, int64_t images_per_part) {
  using A = Accumulator<T>;
  CNNK_SHARED(A, sums, kChannels * kWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
  const int64_t first_image = blockIdx.y * images_per_part;
  const int64_t end_image =
      images - first_image < images_per_part ? images : first_image + images_per_part;
  A* const of_part = totals + int64_t{blockIdx.y} * channels;
  if constexpr (kPixelsFirst) {
    for (int i = warp; i < kChannels && first_channel + i < channels; i += kWarps) {
      A sum = 0;
      for (int64_t image = first_image; image < end_image; ++image) {
        const T* const plane = gradient + (image * channels + first_channel + i) * pixels;
        for (int64_t pixel = lane; pixel < pixels; pixel += 32) sum += to_accumulator(plane[pixel]);
      }
      sum = warp_sum(sum);
      if (lane == 0) of_part[first_channel + i] = sum;
    }
  } else {
    A sum = 0;
    const int channel = first_channel + lane;
    if (channel < channels) {
      for (int64_t pixel = first_image * pixels + warp; pixel < end_image * pixels;
           pixel += kWarps) {
        sum += to_accumulator(gradient[pixel * channels + channel]);
      }
    }
    sums[warp * kChannels + lane] = sum;
    __syncthreads();  // all sums are there
    if (warp == 0 && channel < channels) {
      for (int other = 1; other < kWarps; ++other) sum += sums[other * kChannels + lane];
      of_part[channel] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_sum_kernel(const Accumulator<T>* totals, int parts, int channels, T* grad_bias) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= channels) return;
  Accumulator<T> sum = 0;
  for (int part = 0; part < parts; ++part) sum += totals[int64_t{part} * channels + channel];
  grad_bias[channel] = from_accumulator<T>(sum);
}

}  // namespace

int64_t bias_total_bytes(const Conv2dProblem& problem, int parts) {
  return parts * problem.out_channels * accumulator_size(problem.dtype);
}

Error bias_gradient(const Conv2dProblem& problem, int parts, const void* grad_output,
                    void* grad_bias, void* workspace, Stream stream) {
  Error error = kSuccess;
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        problem.layout == Layout::nchw ? bias_totals_kernel<T, true> : bias_totals_kernel<T, false>;
    const int channels = static_cast<int>(problem.out_channels);
    auto* const totals = static_cast<Accumulator<T>*>(workspace);
    LaunchGrid grid;
    grid.x = static_cast<unsigned>(ceil_div(channels, kChannels));
    grid.y = static_cast<unsigned>(parts);
    grid.block_x = kThreads;
    error =
        launch(kernel, grid, 0, stream, static_cast<const T*>(grad_output), totals, problem.batch,
               problem.out_height * problem.out_width, channels, ceil_div(problem.batch, parts));
    if (error != kSuccess) return;
    LaunchGrid all;
    all.x = static_cast<unsigned>(ceil_div(channels, kThreads));
    all.block_x = kThreads;
    error = launch(bias_sum_kernel<T>, all, 0, stream, totals, parts, channels,
                   static_cast<T*>(grad_bias));
  });
  return error;
}

}  // namespace cnnkernels::cuda
