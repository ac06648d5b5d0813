// Direct convolution, forward and input gradient: first layers, and what tensor cores do not take.
// With pooling, the fused block.
//
// A thread sums kPixels pixels of kChannels result channels in registers. Weights lie in shared
// memory in the type of the sums, [tap, source channel][result channel], so that all threads of a
// warp read the same 16 bytes at once: two pixels by sixteen channels are 32 multiply-adds for four
// such reads and two elements of the source. A first layer's filter fits whole; a deeper one comes
// in slices. The source is read where it lies: the threads of a warp take neighbouring pixels, and
// the taps of a pixel meet those of its neighbours in the first-level cache. Bias and ReLU are
// applied to the sums, which go out from registers. To be pooled they meet in shared memory first,
// where the weights were: then a block's pixels are a tile of whole windows (tile_results.cuh).
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/tile_results.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kDirectThreads = 128;
constexpr int kDirectBlocks = 3;  // of a multiprocessor: up to 168 registers a thread
constexpr int kPixels = 2;
constexpr int kTilePixels = kPixels * kDirectThreads;
constexpr int kSliceBytes = 32 * 1024;

// Result number `local` of a tile, as a position of the pass.
__device__ inline PassPosition tile_position(const ConvolutionPass& pass, const SourcePatch& patch,
                                             const PatchTile& tile, int local) {
  const TileResult result = tile_result(pass, patch, tile, local);
  PassPosition at;
  at.exists = result.exists;
  at.row = (tile.row + result.row) * pass.source_step_h;
  at.column = (tile.column + result.column) * pass.source_step_w;
  at.source = (tile.image + result.image) * pass.source_stride_n;
  at.result = 0;  // it is pooled first
  return at;
}

// The patch tells the tiles of a pooled pass, and else no more than their number.
template <class T, int kChannels, bool kPooled>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    direct_kernel(const __grid_constant__ ConvolutionPass pass,
                  const __grid_constant__ SourcePatch patch, const T* source, const T* weight,
                  ResultTarget<T> target, BlockPool pool) {
  using A = Accumulator<T>;
  using Staged = StagedTile<T, kTilePixels, kChannels>;
  constexpr int kSlice = kSliceBytes / (kChannels * static_cast<int>(sizeof(A)));
  constexpr int kStagedSums =
      kPooled ? Staged::kElements * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(A)) : 0;
  constexpr int kShared = kSlice * kChannels > kStagedSums ? kSlice * kChannels : kStagedSums;
  CNNK_SHARED(A, weights, kShared);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.z);
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const int channels = pass.result_channels - first_channel < kChannels
                           ? pass.result_channels - first_channel
                           : kChannels;
  const int block = static_cast<int>(blockIdx.x);
  PatchTile tile = {};
  if constexpr (kPooled) tile = patch_tile(pass, patch, block);
  const PassPhase& phase = kPooled ? pass.phases[0] : phase_of_tile(pass, block);
  const int first_position = (block - phase.first_tile) * kTilePixels;
  PassPosition at[kPixels];
  A sums[kPixels][kChannels];
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    const int local = u * kDirectThreads + thread;
    at[u] = kPooled ? tile_position(pass, patch, tile, local)
                    : pass_position(pass, phase, first_position + local);
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
  if constexpr (kPooled) {
    const Staged staged = {reinterpret_cast<T*>(weights), pass.result_stride_c != 1};
    __syncthreads();  // the last slice is multiplied
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (k >= channels) break;
        staged.elements[staged.at(u * kDirectThreads + thread, k)] =
            finished_sum(target, sums[u][k], channel0 + k);
      }
    }
    __syncthreads();  // all results are staged
    pool_tile<kDirectThreads>(pass, patch, tile, staged, target, pool, channel0, channels);
    return;
  }
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int u = 0; u < kPixels; ++u) {
    if (!at[u].exists) continue;
    T* const pixel = target.result + at[u].result + channel0 * pass.result_stride_c;
    if (target.vectors) {
#pragma unroll
      for (int k = 0; k < kChannels; k += kWidth) {
        if (k >= channels) break;
        Vector<T, kWidth> values;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          values[v] = finished_sum(target, sums[u][k + v], channel0 + k + v);
        }
        store_vector<kWidth>(pixel + k, values);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (k >= channels) break;
        pixel[k * pass.result_stride_c] = finished_sum(target, sums[u][k], channel0 + k);
      }
    }
  }
}

template <class T, int kChannels>
Error launch_direct(const PassCall& call) {
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(call.patch.tiles);
  grid.y = static_cast<unsigned>(ceil_div(call.pass.result_channels, kChannels));
  grid.z = static_cast<unsigned>(call.pass.groups);
  grid.block_x = kDirectThreads;
  const auto kernel =
      call.pool != nullptr ? direct_kernel<T, kChannels, true> : direct_kernel<T, kChannels, false>;
  return launch(kernel, grid, 0, call.stream, call.pass, call.patch,
                static_cast<const T*>(call.source), static_cast<const T*>(call.weight),
                call.target<T>(), call.pooling());
}

}  // namespace

Error direct_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                  const void* bias, void* result, bool relu, int64_t alignment,
                  const MaxPool2dProblem* pool, void* argmax, Stream stream) {
  const int64_t width = kVectorBytes / element_size(dtype);
  const bool vectors = alignment % kVectorBytes == 0 && pass.result_stride_c == 1 &&
                       pass.result_channels % width == 0 && pass.result_stride_w % width == 0;
  SourcePatch patch = {};
  BlockPool pooled = {};
  if (pool != nullptr) {
    patch = make_source_patch(pass, kTilePixels, pool);
    pooled = block_pool(*pool, argmax);
    store_pooled(pass, *pool);
  } else {
    patch.tiles = number_tiles(pass, kTilePixels);
  }
  const PassCall call = {pass,   patch,   source,
                         weight, bias,    result,
                         relu,   vectors, pool != nullptr ? &pooled : nullptr,
                         stream};
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    // Sixteen doubles of two pixels are more registers than a thread has.
    constexpr int kMany = sizeof(T) == 8 ? 8 : 16;
    error = pass.result_channels <= 8 ? launch_direct<T, 8>(call) : launch_direct<T, kMany>(call);
  });
  return error;
}

}  // namespace cnnkernels::cuda
