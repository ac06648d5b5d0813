// Convolution at stride 1 by warpgroup products of sm_90a, forward and input gradient, of 16-bit
// NHWC sources.
//
// A block has 16 rows of 8 neighbouring results of an image, by 64 or 128 channels. The patch of
// the source below them, with the border that the taps reach, is brought to shared memory once for
// every 64 channels, as [chunk of 8 channels][row][column][16 bytes], by one copy of a box whose
// outside is zero. A product reads its rows as core matrices, eight rows of 16 bytes in one piece:
// here eight neighbouring pixels, at whatever pixel they begin. So a tap is a start address in the
// patch, the next eight rows are the patch's next row, and the next chunk is a plane away.
//
// Weights, packed as [group][channel][tap][source channel], come a tap at a time, through a ring of
// stages: a row of 128 bytes a result channel, swizzled, so that a copy reads long rows.
//
//   warps 0-7   two warpgroups, of 8 rows each: sums of 64 results by 64 or 128 channels, in 32 or
//               64 registers a thread. While the products of a tap run, those of the one before
//               are waited for and its stage is handed back.
//   warp 8      a thread of it begins the copies: a patch ahead, and as many taps as stages
//
// 128 x 128 sums take 110 KiB of buffers with a 3x3 kernel, so that two blocks share a
// multiprocessor and one multiplies while the other stores. Sums go out through the same memory.
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/conv2d_wgmma.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/tile_results.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kConsumerWarps = kWarpgroups * kWarpgroup / 32;
constexpr int kThreads = kConsumerWarps * 32 + 32;
constexpr int kRowsOfWarpgroup = kWgmmaRows / kWarpgroups;
constexpr int kWeightRowBytes = 128;
constexpr int kProductDepth = 16;
constexpr int kSlabProducts = kWgmmaSlab / kProductDepth;
static_assert(kRowsOfWarpgroup * kWgmmaColumns == 64, "rows of a product");
static_assert(kWgmmaSlab * 2 == kWeightRowBytes, "a slab's weights are a swizzled row");

// Code that lacks the products takes fewer threads than a launch has, which is an error of the
// launch.
constexpr int kMostThreads = kHopper ? kThreads : 32, kLeastBlocks = kHopper ? 2 : 1;

struct Ring {
  Barrier patch_full[kMostPatchStages], patch_empty[kMostPatchStages];
  Barrier weights_full[kMostWeightStages], weights_empty[kMostWeightStages];
};

// The stage that comes next, and the parity of the phase in which it is filled.
struct Stage {
  int index, parity;

  __device__ void advance(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The products of a tap, as a group. There is a loop of each length: in one of any length the
// compiler would have the sums wait before every product.
template <class T, int kProducts, int kSums>
__device__ inline void multiply_tap(float (&sums)[kSums], uint64_t rows, uint64_t columns,
                                    int plane_bytes) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    wgmma_m64k16<T>(sums, advance_descriptor(rows, i * 2 * plane_bytes),
                    advance_descriptor(columns, i * kProductDepth * static_cast<int>(sizeof(T))));
  }
  wgmma_commit();
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks)
    wgmma_kernel(const __grid_constant__ CUtensorMap source_map,
                 const __grid_constant__ CUtensorMap weight_map,
                 const __grid_constant__ ConvolutionPass pass,
                 const __grid_constant__ SourcePatch patch, const __grid_constant__ WgmmaCut cut,
                 const ResultTarget<T> target) {
  if constexpr (kHopper) {
    CNNK_SHARED(Ring, rings, 1);
    CNNK_DYNAMIC_SHARED(unsigned char, shared);
    Ring& ring = rings[0];
    constexpr int kWeightBytes = weight_bytes(kChannels);
    const int box_bytes = patch_bytes(cut, patch);
    const int stage_bytes = (box_bytes + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
    unsigned char* const weights = shared + (-shared_address(shared) & (kSwizzleBytes - 1));
    unsigned char* const patches = weights + cut.weight_stages * kWeightBytes;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    // The compiler is to see that a warp goes one way.
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const PassPhase& phase = pass.phases[0];
    const PatchPhase& below = patch.phases[0];
    const PatchTile tile = patch_tile(pass, patch, static_cast<int>(blockIdx.x));
    const int group = static_cast<int>(blockIdx.z);
    const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
    const int slabs = (pass.source_channels + kWgmmaSlab - 1) / kWgmmaSlab;

    if (thread == 0) {
      for (int i = 0; i < kMostPatchStages; ++i) {
        init_barrier(ring.patch_full[i], 1);
        init_barrier(ring.patch_empty[i], kConsumerWarps);
      }
      for (int i = 0; i < kMostWeightStages; ++i) {
        init_barrier(ring.weights_full[i], 1);
        init_barrier(ring.weights_empty[i], kConsumerWarps);
      }
      publish_barriers();
    }
    __syncthreads();  // the barriers are there

    float sums[kChannels / 2] = {};
    Stage patch_stage = {0, 0}, weight_stage = {0, 0};
    if (warp == kConsumerWarps) {
      if (lane == 0) {
        for (int slab = 0; slab < slabs; ++slab) {
          // Nobody empties a stage before it is filled: the first time the phase before counts.
          wait(ring.patch_empty[patch_stage.index], patch_stage.parity ^ 1);
          Barrier& patch_full = ring.patch_full[patch_stage.index];
          arrive_expecting(patch_full, box_bytes);
          const int chunks = pass.source_channels / kWgmmaChunk;
          copy_box(patches + patch_stage.index * stage_bytes, source_map, patch_full,
                   {0, tile.column + below.column, tile.row + below.row,
                    group * chunks + slab * (kWgmmaSlab / kWgmmaChunk), tile.image});
          patch_stage.advance(cut.patch_stages);
          for (int tap = 0; tap < phase.taps; ++tap) {
            wait(ring.weights_empty[weight_stage.index], weight_stage.parity ^ 1);
            Barrier& weights_full = ring.weights_full[weight_stage.index];
            arrive_expecting(weights_full, kWeightBytes);
            copy_box(
                weights + weight_stage.index * kWeightBytes, weight_map, weights_full,
                {slab * kWgmmaSlab, pass.taps[phase.first_tap + tap].index, first_channel, group});
            weight_stage.advance(cut.weight_stages);
          }
        }
      }
      __syncwarp();
    } else {
      const int first_row = warp / (kWarpgroup / 32) * kRowsOfWarpgroup;
      const uint32_t patch_address = shared_address(patches),
                     weight_address = shared_address(weights);
      const int plane_bytes = patch_plane_bytes(patch);
      const uint64_t any_rows = matrix_descriptor(0, plane_bytes, below.width * kChunkBytes, false);
      const uint64_t any_weights = matrix_descriptor(0, kChunkBytes, 8 * kWeightRowBytes, true);
      int used_patch = 0, used_weights = 0;  // stages of the products before
      for (int slab = 0; slab < slabs; ++slab) {
        wait(ring.patch_full[patch_stage.index], patch_stage.parity);
        const int channels = pass.source_channels - slab * kWgmmaSlab;
        // Chunks past the last are not multiplied: they may be another group's.
        const int products = (channels + kProductDepth - 1) / kProductDepth;
        const uint32_t first_pixel =
            patch_address + patch_stage.index * stage_bytes + first_row * below.width * kChunkBytes;
        for (int tap = 0; tap < phase.taps; ++tap) {
          const int pixel = patch.taps[phase.first_tap + tap].pixel;
          const uint64_t rows = advance_descriptor(any_rows, first_pixel + pixel * kChunkBytes);
          const uint64_t columns =
              advance_descriptor(any_weights, weight_address + weight_stage.index * kWeightBytes);
          wait(ring.weights_full[weight_stage.index], weight_stage.parity);
          switch (products) {
            case 1:
              multiply_tap<T, 1>(sums, rows, columns, plane_bytes);
              break;
            case 2:
              multiply_tap<T, 2>(sums, rows, columns, plane_bytes);
              break;
            case 3:
              multiply_tap<T, 3>(sums, rows, columns, plane_bytes);
              break;
            default:
              multiply_tap<T, kSlabProducts>(sums, rows, columns, plane_bytes);
          }
          wgmma_wait<1>();  // for the tap before, of which each warp hands back what it has read
          if (lane == 0) {
            if (slab + tap > 0) arrive(ring.weights_empty[used_weights]);
            if (slab > 0 && tap == 0) arrive(ring.patch_empty[used_patch]);
          }
          used_weights = weight_stage.index;
          weight_stage.advance(cut.weight_stages);
        }
        used_patch = patch_stage.index;
        patch_stage.advance(cut.patch_stages);
      }
      wgmma_finish(sums);
    }

    __syncthreads();  // all is multiplied
    const StagedTile<T, kWgmmaPixels, kChannels> staged = {reinterpret_cast<T*>(weights),
                                                           pass.result_stride_c != 1};
    const int group_channel = group * pass.result_channels + first_channel;
    const int channels = pass.result_channels - first_channel;
    if (warp < kConsumerWarps) {
#pragma unroll
      for (int i = 0; i < kChannels / 2; ++i) {
        const int pixel = warp * 16 + lane / 4 + i % 4 / 2 * 8;
        const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (channel >= channels) continue;
        staged.elements[staged.at(pixel, channel)] =
            finished_sum(target, sums[i], group_channel + channel);
      }
    }
    __syncthreads();  // all results are staged
    store_tile<kThreads>(pass, patch, tile, staged, target, group_channel, channels);
  }
}

// As 8 channels, columns, rows, chunks of channels, and images.
TensorBoxes source_boxes(const ConvolutionPass& pass, const SourcePatch& patch, const WgmmaCut& cut,
                         const void* source) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  const auto extent = [](int value) { return static_cast<uint32_t>(value); };
  return {5,
          source,
          {kWgmmaChunk, size(pass.source_width), size(pass.source_height),
           size(int64_t{pass.groups} * pass.source_channels / kWgmmaChunk), size(pass.images)},
          {size(pass.source_stride_w * 2), size(pass.source_stride_h * 2), kChunkBytes,
           size(pass.source_stride_n * 2)},
          {kWgmmaChunk, extent(patch.phases[0].width), extent(patch.phases[0].height),
           extent(cut.slab_chunks), 1},
          false};
}

// As source channels, taps, result channels, and groups.
TensorBoxes weight_boxes(const ConvolutionPass& pass, const WgmmaCut& cut, const void* packed) {
  const auto channels = static_cast<uint64_t>(pass.source_channels);
  const auto taps = static_cast<uint64_t>(pass.kernel_taps());
  const auto results = static_cast<uint64_t>(pass.result_channels);
  return {4,
          packed,
          {channels, taps, results, static_cast<uint64_t>(pass.groups)},
          {channels * 2, taps * channels * 2, results * taps * channels * 2},
          {kWgmmaSlab, 1, static_cast<uint32_t>(cut.channels), 1},
          true};
}

template <class T>
Error wgmma_of(const ConvolutionPass& pass, const void* source, const void* packed,
               const void* bias, void* result, bool relu, Stream stream) {
  const SourcePatch patch = wgmma_patch(pass);
  const WgmmaCut cut = wgmma_cut(pass, patch);
  CUtensorMap source_map, weight_map;
  Error error = encode_tensor_map(source_boxes(pass, patch, cut, source), &source_map);
  if (error == kSuccess) error = encode_tensor_map(weight_boxes(pass, cut, packed), &weight_map);
  if (error != kSuccess) return error;
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(patch.tiles);
  grid.y = static_cast<unsigned>(ceil_div(pass.result_channels, cut.channels));
  grid.z = static_cast<unsigned>(pass.groups);
  grid.block_x = kThreads;
  const auto alignment = reinterpret_cast<uintptr_t>(result) % kVectorBytes == 0 ? kVectorBytes : 1;
  const ResultTarget<T> target = {static_cast<T*>(result), static_cast<const T*>(bias), relu,
                                  results_are_vectors(pass, patch, sizeof(T), alignment)};
  const auto kernel = cut.channels == 128 ? wgmma_kernel<T, 128> : wgmma_kernel<T, 64>;
  return launch(kernel, grid, cut.shared_bytes, stream, source_map, weight_map, pass, patch, cut,
                target);
}

}  // namespace

Error wgmma_pass(DType dtype, const ConvolutionPass& pass, const void* source, const void* weight,
                 const void* bias, void* result, bool relu, void* workspace, Stream stream) {
  const Error error = pack_weights(dtype, pass, weight, workspace, stream);
  if (error != kSuccess) return error;
  const auto run = dtype == DType::float16 ? wgmma_of<float16> : wgmma_of<bfloat16>;
  return run(pass, source, workspace, bias, result, relu, stream);
}

}  // namespace cnnkernels::cuda
