// Convolution as a matrix product on tensor cores, forward and input gradient.
//
// Rows of the product are results (pixels), columns are result channels, and the depth is every tap
// with all of its source channels. The matrix of patches is never written: a block copies the slice
// of it that it multiplies, 64 bytes deep, straight from the source to shared memory.
//
//   tile     128 x 128 results by channels, or 64 x 64 where that leaves multiprocessors idle;
//            a warp has 64 x 32 or 32 x 32 of it, in registers
//   slice    four chunks of 16 bytes: 32 elements of 16 bits, or 16 floats, of one tap each
//   stages   three slices in shared memory: while one is multiplied the next are under way
//
// Weights are packed beforehand, [group][channel][tap][source channel], channels filled up to whole
// chunks with zeros, and copied asynchronously. So is the source in NHWC, where a chunk lies in one
// piece; in NCHW a thread loads a chunk's elements, of neighbouring pixels in neighbouring threads,
// into registers before the products of a slice and stores them behind. A row of a slice is 64
// bytes, and chunk j of row r lies in place j ^ (r / 2 % 4): the eight rows that an ldmatrix reads
// are then in different banks. float32 is multiplied in TF32, or in two TF32 parts, a = high + low,
// as high high + high low + low high.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/gemm_tile.cuh"

namespace cnnkernels::cuda {
namespace {

constexpr int kStages = 3;
constexpr unsigned kWholeWarp = 0xffffffffu;

// A chunk of the depth: a tap, counted from the phase's first, and source channels.
struct DepthChunk {
  int tap, chunk;  // of chunks_per_tap

  __device__ void advance(int chunks, int chunks_per_tap) {
    chunk += chunks;
    while (chunk >= chunks_per_tap) {
      chunk -= chunks_per_tap;
      ++tap;
    }
  }
};

template <class Products, int kTile, bool kContiguous>
__global__ void __launch_bounds__(2 * kTile)
    implicit_gemm_kernel(const __grid_constant__ ConvolutionPass pass,
                         const typename Products::Element* source,
                         const typename Products::Element* packed,
                         const typename Products::Element* bias, typename Products::Element* result,
                         bool relu) {
  using T = typename Products::Element;
  constexpr int kThreads = 2 * kTile;
  constexpr int kElements = kChunkElements<T>;
  // How a thread's share of a slice lies: rows of one chunk, or chunks of one row.
  constexpr int kRows = kContiguous ? 2 : 1, kChunks = kContiguous ? 1 : 2;
  using Buffers = Slices<kTile, kStages>;
  CNNK_SHARED(Buffers, shared, 1);
  Buffers& slices = shared[0];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = static_cast<int>(blockIdx.z);
  const int first_channel = static_cast<int>(blockIdx.y) * kTile;
  const PassPhase& phase = phase_of_tile(pass, static_cast<int>(blockIdx.x));
  const int first_position = (static_cast<int>(blockIdx.x) - phase.first_tile) * kTile;
  const int chunks_per_tap = (pass.source_channels + kElements - 1) / kElements;
  const int depth = phase.taps * chunks_per_tap;
  const int slice_count = (depth + kSliceChunks - 1) / kSliceChunks;
  source += group * pass.source_channels * pass.source_stride_c;
  packed += int64_t{group} * pass.result_channels * pass.kernel_taps() * chunks_per_tap * kElements;

  // The source: this thread's rows and chunks, and where the next slice to be copied begins.
  const int source_row = kContiguous ? thread / kSliceChunks : thread % kTile;
  const int source_chunk = kContiguous ? thread % kSliceChunks : thread / kTile;
  PassPosition at[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    at[i] = pass_position(pass, phase, first_position + source_row + i * (kThreads / kSliceChunks));
  }
  DepthChunk source_depth[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    source_depth[i] = {0, 0};
    source_depth[i].advance(source_chunk + 2 * i, chunks_per_tap);
  }
  const int weight_row = thread / kSliceChunks, weight_chunk = thread % kSliceChunks;
  DepthChunk weight_depth = {0, 0};
  weight_depth.advance(weight_chunk, chunks_per_tap);

  const auto copy_weights = [&](int stage) {
    const bool inside_depth = weight_depth.tap < phase.taps;
    const int tap = inside_depth ? pass.taps[phase.first_tap + weight_depth.tap].index : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = weight_row + i * (kThreads / kSliceChunks);
      const bool inside = inside_depth && first_channel + row < pass.result_channels;
      const int64_t chunk =
          (int64_t{first_channel + row} * pass.kernel_taps() + tap) * chunks_per_tap +
          weight_depth.chunk;
      cp_async<kChunkBytes>(&slices.columns[stage][chunk_place(row, weight_chunk)],
                            packed + (inside ? chunk * kElements : 0), inside ? kChunkBytes : 0);
    }
    weight_depth.advance(kSliceChunks, chunks_per_tap);
  };
  const auto copy_source = [&](int stage) {
    const bool inside_depth = source_depth[0].tap < phase.taps;
    const PassTap tap = pass.taps[phase.first_tap + (inside_depth ? source_depth[0].tap : 0)];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = source_row + i * (kThreads / kSliceChunks);
      const bool inside = inside_depth && tap_is_inside(pass, at[i], tap);
      const int64_t element = tap_element(pass, at[i], tap) + source_depth[0].chunk * kElements;
      cp_async<kChunkBytes>(&slices.rows[stage][chunk_place(row, source_chunk)],
                            source + (inside ? element : 0), inside ? kChunkBytes : 0);
    }
    source_depth[0].advance(kSliceChunks, chunks_per_tap);
  };
  // What copy_source does in two halves, around the products of a slice.
  Vector<T, kElements> loaded[kChunks];
  const auto load_source = [&] {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const bool inside_depth = source_depth[i].tap < phase.taps;
      const PassTap tap = pass.taps[phase.first_tap + (inside_depth ? source_depth[i].tap : 0)];
      const bool inside = inside_depth && tap_is_inside(pass, at[0], tap);
      const int c = source_depth[i].chunk * kElements;
      const T* const elements =
          source + (inside ? tap_element(pass, at[0], tap) + c * pass.source_stride_c : 0);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        loaded[i][e] = inside && c + e < pass.source_channels ? elements[e * pass.source_stride_c]
                                                              : from_accumulator<T>(0);
      }
      source_depth[i].advance(kSliceChunks, chunks_per_tap);
    }
  };
  const auto store_source = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      store_vector<kElements>(
          reinterpret_cast<T*>(&slices.rows[stage][chunk_place(source_row, source_chunk + 2 * i)]),
          loaded[i]);
    }
  };

  const int warp_row = warp % 2 * (kTile / 2), warp_column = warp / 2 * kWarpColumns;
  WarpSums<kTile> sums = {};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < slice_count) {
      copy_weights(stage);
      if constexpr (kContiguous) {
        copy_source(stage);
      } else {
        load_source();
        store_source(stage);
      }
    }
    cp_async_commit();
  }
  for (int slice = 0; slice < slice_count; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the slice is there, and the one before is multiplied
    const int next = slice + kStages - 1;
    if (next < slice_count) {
      copy_weights(next % kStages);
      if constexpr (kContiguous) {
        copy_source(next % kStages);
      } else {
        load_source();
      }
    }
    cp_async_commit();
    const int stage = slice % kStages;
    multiply_slice<Products>(slices, stage, warp_row, warp_column, lane, sums);
    if constexpr (!kContiguous) {
      if (next < slice_count) store_source(next % kStages);
    }
  }

  // Sums go out through shared memory, sixteen rows of a warp at a time, so that the lanes of a
  // store have neighbouring pixels in NCHW and neighbouring channels in NHWC.
  cp_async_wait<0>();
  __syncthreads();  // all is multiplied
  constexpr int kStagedRow = kWarpColumns + 1;
  float* const staged = reinterpret_cast<float*>(&slices) + warp * 16 * kStagedRow;
  const bool pixels_first = pass.result_stride_c != 1;
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        staged[(lane / 4 + e / 2 * 8) * kStagedRow + j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
      }
    }
    __syncwarp();
    const PassPosition own =
        pass_position(pass, phase, first_position + warp_row + i * 16 + lane % 16);
    for (int part = 0; part < 16; ++part) {
      const int row = pixels_first ? lane % 16 : part;
      const int column = pixels_first ? 2 * part + lane / 16 : lane;
      const int64_t pixel = __shfl_sync(kWholeWarp, own.result, row);
      const bool exists = __shfl_sync(kWholeWarp, static_cast<int>(own.exists), row) != 0;
      const int channel = first_channel + warp_column + column;
      if (!exists || channel >= pass.result_channels) continue;
      const int64_t all_channels = int64_t{group} * pass.result_channels + channel;
      float sum = staged[row * kStagedRow + column];
      if (bias != nullptr) sum += to_accumulator(bias[all_channels]);
      if (relu) sum = sum < 0 ? 0 : sum;  // and NaN stays
      result[pixel + all_channels * pass.result_stride_c] = from_accumulator<T>(sum);
    }
    __syncwarp();
  }
}

// packed[group][channel][tap][source channel], zeros behind the last source channel.
constexpr int kPackThreads = 256;
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_weights_kernel(const __grid_constant__ ConvolutionPass pass, const T* weight, T* packed,
                        int padded_channels) {
  const int64_t count =
      int64_t{pass.groups} * pass.result_channels * pass.kernel_taps() * padded_channels;
  const int64_t step = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < count; i += step) {
    const int c = static_cast<int>(i % padded_channels);
    const int64_t row = i / padded_channels;
    const int tap = static_cast<int>(row % pass.kernel_taps());
    const int64_t channels = row / pass.kernel_taps();
    const int k = static_cast<int>(channels % pass.result_channels);
    const int64_t group = channels / pass.result_channels;
    const int64_t element = group * pass.weight_stride_group + k * pass.weight_stride_result +
                            c * pass.weight_stride_source +
                            tap / pass.kernel_width * pass.weight_stride_r +
                            tap % pass.kernel_width * pass.weight_stride_s;
    packed[i] = c < pass.source_channels ? weight[element] : from_accumulator<T>(0);
  }
}

template <class Products, int kTile, bool kContiguous>
Error launch_gemm(ConvolutionPass& pass, const void* source, const void* packed, const void* bias,
                  void* result, bool relu, Stream stream) {
  using T = typename Products::Element;
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(number_tiles(pass, kTile));
  grid.y = static_cast<unsigned>(ceil_div(pass.result_channels, kTile));
  grid.z = static_cast<unsigned>(pass.groups);
  grid.block_x = 2 * kTile;
  return launch(implicit_gemm_kernel<Products, kTile, kContiguous>, grid, 0, stream, pass,
                static_cast<const T*>(source), static_cast<const T*>(packed),
                static_cast<const T*>(bias), static_cast<T*>(result), relu);
}

template <class Products>
Error gemm_of(const GemmChoice& choice, ConvolutionPass& pass, const void* source,
              const void* weight, const void* bias, void* result, bool relu, void* workspace,
              Stream stream) {
  using T = typename Products::Element;
  const int padded = static_cast<int>(round_up(pass.source_channels, kChunkElements<T>));
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(std::min(
      kMostBlocksX,
      ceil_div(packed_weight_bytes(pass, sizeof(T)) / static_cast<int>(sizeof(T)), kPackThreads)));
  grid.block_x = kPackThreads;
  const Error error = launch(pack_weights_kernel<T>, grid, 0, stream, pass,
                             static_cast<const T*>(weight), static_cast<T*>(workspace), padded);
  if (error != kSuccess) return error;
  const auto run = choice.tile == 128 ? (choice.contiguous ? launch_gemm<Products, 128, true>
                                                           : launch_gemm<Products, 128, false>)
                                      : (choice.contiguous ? launch_gemm<Products, 64, true>
                                                           : launch_gemm<Products, 64, false>);
  return run(pass, source, workspace, bias, result, relu, stream);
}

}  // namespace

int64_t packed_weight_bytes(const ConvolutionPass& pass, int64_t element_bytes) {
  return int64_t{pass.groups} * pass.result_channels * pass.kernel_taps() *
         round_up(pass.source_channels * element_bytes, kChunkBytes);
}

bool chunks_are_contiguous(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment) {
  return pass.source_stride_c == 1 && alignment % kChunkBytes == 0 &&
         pass.source_channels * element_bytes % kChunkBytes == 0;
}

Error implicit_gemm_pass(DType dtype, const GemmChoice& choice, ConvolutionPass pass,
                         const void* source, const void* weight, const void* bias, void* result,
                         bool relu, void* workspace, Stream stream) {
  switch (dtype) {
    case DType::float16:
      return gemm_of<Products16<float16>>(choice, pass, source, weight, bias, result, relu,
                                          workspace, stream);
    case DType::bfloat16:
      return gemm_of<Products16<bfloat16>>(choice, pass, source, weight, bias, result, relu,
                                           workspace, stream);
    default:
      const auto run = choice.products == TensorProducts::tf32 ? gemm_of<ProductsTf32>
                                                               : gemm_of<ProductsOfParts>;
      return run(choice, pass, source, weight, bias, result, relu, workspace, stream);
  }
}

}  // namespace cnnkernels::cuda
