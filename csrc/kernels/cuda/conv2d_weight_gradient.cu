// The gradients of the weight and of the bias.
//
// The weight's is a matrix product too: rows are output channels, columns are the weights of one,
// that is taps with source channels, and the depth is every output pixel of every image. There are
// few rows and columns and a deep depth, so that the depth is cut into parts, as many as give each
// multiprocessor about two blocks; each part has totals of its own, which a second pass adds up in
// their order. Results do not depend on what runs first.
//
// Both matrices are read where they lie. For each slice of the depth a table in shared memory has
// where its pixels are; a thread gathers chunks of a row, neighbouring pixels of one channel, and
// stores them with the depth contiguous, as the tile wants them. In NCHW the threads of a warp take
// neighbouring pixels, in NHWC neighbouring channels.
#include <algorithm>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/convolution_pass.cuh"
#include "kernels/cuda/gemm_tile.cuh"

namespace cnnkernels::cuda {
namespace {

// A pixel of the output: element of channel 0 of a group's gradients and of the source below its
// tap (0, 0), and the position of that.
struct DepthPixel {
  int64_t gradient, source;
  int row, column;
};

// One slice is multiplied while the next is gathered.
constexpr int kStages = 2;

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

// Column number `column` of the product: a tap with a source channel, channels first.
struct WeightColumn {
  PassTap tap;
  int channel;
};
__device__ inline WeightColumn weight_column(const ConvolutionPass& pass, int column) {
  const int tap = column / pass.source_channels;
  return {pass.taps[tap < pass.phases[0].taps ? tap : 0], column % pass.source_channels};
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

// totals[part][group][output channel][weight of it]
template <class Products, int kTile, bool kPixelsFirst>
__global__ void __launch_bounds__(2 * kTile)
    weight_gradient_gemm_kernel(const __grid_constant__ ConvolutionPass pass,
                                const typename Products::Element* gradient,
                                const typename Products::Element* source, float* totals,
                                int positions_per_part) {
  using T = typename Products::Element;
  constexpr int kThreads = 2 * kTile;
  constexpr int kElements = kChunkElements<T>;
  constexpr int kSlicePixels = kSliceChunks * kElements;
  // How a thread's share of a slice lies: chunks of one row, or rows of one chunk.
  constexpr int kRows = kPixelsFirst ? 2 : 1;
  using Buffers = Slices<kTile, kStages>;
  CNNK_SHARED(Buffers, shared, 1);
  CNNK_SHARED(DepthPixel, pixels, kStages * kSlicePixels);
  Buffers& slices = shared[0];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = static_cast<int>(blockIdx.z) % pass.groups;
  const int part = static_cast<int>(blockIdx.z) / pass.groups;
  const int columns = pass.phases[0].taps * pass.source_channels;
  const int first_row = static_cast<int>(blockIdx.x) * kTile;
  const int first_column = static_cast<int>(blockIdx.y) * kTile;
  const int positions = pass.images * pass.phases[0].rows * pass.phases[0].columns;
  const int begin = part * positions_per_part;
  const int end = positions - begin < positions_per_part ? positions : begin + positions_per_part;
  const int slice_count = begin < end ? (end - begin + kSlicePixels - 1) / kSlicePixels : 0;
  gradient += int64_t{group} * pass.result_channels * pass.result_stride_c;
  source += int64_t{group} * pass.source_channels * pass.source_stride_c;

  const int own_row = kPixelsFirst ? thread / kSliceChunks : thread % kTile;
  const int own_chunk = kPixelsFirst ? thread % kSliceChunks : thread / kTile;
  WeightColumn column[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    column[i] = weight_column(pass, first_column + own_row + i * (kThreads / kSliceChunks));
  }

  Vector<T, kElements> rows_loaded[2], columns_loaded[2];
  const auto load = [&](int slice) {
    const DepthPixel* const table = &pixels[slice % kStages * kSlicePixels];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + (kPixelsFirst ? i * (kThreads / kSliceChunks) : 0);
      const int chunk = own_chunk + (kPixelsFirst ? 0 : 2 * i);
      const bool row_exists = first_row + row < pass.result_channels;
      const bool column_exists = first_column + row < columns;
      const int64_t channel = (first_row + row) * pass.result_stride_c;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const DepthPixel pixel = table[chunk * kElements + e];
        rows_loaded[i][e] =
            row_exists ? gradient_at(pixel, gradient, channel) : from_accumulator<T>(0);
        columns_loaded[i][e] = column_exists
                                   ? source_at(pass, pixel, column[kRows == 2 ? i : 0], source)
                                   : from_accumulator<T>(0);
      }
    }
  };
  const auto store = [&](int stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + (kPixelsFirst ? i * (kThreads / kSliceChunks) : 0);
      const int place = chunk_place(row, own_chunk + (kPixelsFirst ? 0 : 2 * i));
      store_vector<kElements>(reinterpret_cast<T*>(&slices.rows[stage][place]), rows_loaded[i]);
      store_vector<kElements>(reinterpret_cast<T*>(&slices.columns[stage][place]),
                              columns_loaded[i]);
    }
  };
  const auto make_table = [&](int slice) {
    if (thread < kSlicePixels) {
      pixels[slice % kStages * kSlicePixels + thread] =
          depth_pixel(pass, begin + slice * kSlicePixels + thread, end);
    }
  };

  const int warp_row = warp % 2 * (kTile / 2), warp_column = warp / 2 * kWarpColumns;
  WarpSums<kTile> sums = {};
  make_table(0);
  __syncthreads();  // the first table is there
  if (slice_count > 0) {
    load(0);
    store(0);
  }
  make_table(1);
  for (int slice = 0; slice < slice_count; ++slice) {
    __syncthreads();  // the slice and the next table are there, and the slice before is multiplied
    const bool more = slice + 1 < slice_count;
    if (more) load(slice + 1);
    multiply_slice<Products>(slices, slice % kStages, warp_row, warp_column, lane, sums);
    if (more) store((slice + 1) % kStages);
    __syncthreads();  // all have read the next table
    make_table(slice + 2);
  }

  float* const of_part =
      totals + (int64_t{part} * pass.groups + group) * pass.result_channels * columns;
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int n = first_column + warp_column + j * 8 + lane % 4 * 2 + e % 2;
        if (row < pass.result_channels && n < columns) {
          of_part[int64_t{row} * columns + n] = sums[i][j][e];
        }
      }
    }
  }
}

// The same without tensor cores: for float64, and for devices that have none of these products.
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

// Adds up the parts' totals, in their order, and stores them as the weight lies.
constexpr int kSumThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const __grid_constant__ ConvolutionPass pass, const Accumulator<T>* totals,
                     int parts, T* grad_weight) {
  const int columns = pass.phases[0].taps * pass.source_channels;
  const int64_t count = int64_t{pass.groups} * pass.result_channels * columns;
  const int64_t step = int64_t{gridDim.x} * kSumThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < count; i += step) {
    Accumulator<T> sum = 0;
    for (int part = 0; part < parts; ++part) sum += totals[part * count + i];
    const WeightColumn column = weight_column(pass, static_cast<int>(i % columns));
    const int64_t channels = i / columns;
    const int64_t k = channels % pass.result_channels, group = channels / pass.result_channels;
    grad_weight[group * pass.weight_stride_group + k * pass.weight_stride_result +
                column.channel * pass.weight_stride_source + tap_weight(pass, column.tap)] =
        from_accumulator<T>(sum);
  }
}

template <class Launch>
Error launch_parts(const ConvolutionPass& pass, int tile, int parts, int threads, Launch&& run) {
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(ceil_div(pass.result_channels, tile));
  grid.y =
      static_cast<unsigned>(ceil_div(int64_t{pass.phases[0].taps} * pass.source_channels, tile));
  grid.z = static_cast<unsigned>(pass.groups * parts);
  grid.block_x = static_cast<unsigned>(threads);
  return run(grid);
}

template <class T>
Error sum_parts(const ConvolutionPass& pass, int parts, const void* totals, void* grad_weight,
                Stream stream) {
  const int64_t weights =
      int64_t{pass.groups} * pass.result_channels * pass.phases[0].taps * pass.source_channels;
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(std::min(kMostBlocksX, ceil_div(weights, kSumThreads)));
  grid.block_x = kSumThreads;
  return launch(sum_parts_kernel<T>, grid, 0, stream, pass,
                static_cast<const Accumulator<T>*>(totals), parts, static_cast<T*>(grad_weight));
}

template <class Products, int kTile>
Error weight_gemm(const ConvolutionPass& pass, int parts, int positions_per_part,
                  const void* gradient, const void* source, void* totals, Stream stream) {
  using T = typename Products::Element;
  const bool pixels_first = pass.result_stride_c != 1;
  const auto kernel = pixels_first ? weight_gradient_gemm_kernel<Products, kTile, true>
                                   : weight_gradient_gemm_kernel<Products, kTile, false>;
  return launch_parts(pass, kTile, parts, 2 * kTile, [&](const LaunchGrid& grid) {
    return launch(kernel, grid, 0, stream, pass, static_cast<const T*>(gradient),
                  static_cast<const T*>(source), static_cast<float*>(totals), positions_per_part);
  });
}

template <class Products>
Error weight_gemm_of(const GemmChoice& choice, const ConvolutionPass& pass, int parts,
                     int positions_per_part, const void* gradient, const void* source, void* totals,
                     Stream stream) {
  const auto run = choice.rows == 128 ? weight_gemm<Products, 128> : weight_gemm<Products, 64>;
  return run(pass, parts, positions_per_part, gradient, source, totals, stream);
}

}  // namespace

int64_t weight_total_bytes(const ConvolutionPass& pass, int parts, DType dtype) {
  return int64_t{parts} * pass.groups * pass.result_channels * pass.phases[0].taps *
         pass.source_channels * accumulator_size(dtype);
}

// Whole slices of either kernel.
int positions_of_part(const ConvolutionPass& pass, int parts) {
  constexpr int kMultiple = 32;
  const int64_t positions = int64_t{pass.images} * pass.phases[0].rows * pass.phases[0].columns;
  return static_cast<int>(round_up(ceil_div(positions, parts), kMultiple));
}

Error weight_gradient_gemm(DType dtype, const GemmChoice& choice, const ConvolutionPass& pass,
                           int parts, const void* gradient, const void* source, void* grad_weight,
                           void* workspace, Stream stream) {
  const int positions = positions_of_part(pass, parts);
  Error error = kSuccess;
  if (dtype == DType::float16) {
    error = weight_gemm_of<Products16<float16>>(choice, pass, parts, positions, gradient, source,
                                                workspace, stream);
  } else if (dtype == DType::bfloat16) {
    error = weight_gemm_of<Products16<bfloat16>>(choice, pass, parts, positions, gradient, source,
                                                 workspace, stream);
  } else if (choice.products == TensorProducts::tf32) {
    error = weight_gemm_of<ProductsTf32>(choice, pass, parts, positions, gradient, source,
                                         workspace, stream);
  } else {
    error = weight_gemm_of<ProductsOfParts>(choice, pass, parts, positions, gradient, source,
                                            workspace, stream);
  }
  if (error != kSuccess) return error;
  with_dtype(dtype, [&](auto element) {
    error = sum_parts<decltype(element)>(pass, parts, workspace, grad_weight, stream);
  });
  return error;
}

Error weight_gradient_plain(DType dtype, const ConvolutionPass& pass, int parts,
                            const void* gradient, const void* source, void* grad_weight,
                            void* workspace, Stream stream) {
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    error = launch_parts(pass, kPlainTile, parts, kPlainThreads, [&](const LaunchGrid& grid) {
      return launch(weight_gradient_plain_kernel<T>, grid, 0, stream, pass,
                    static_cast<const T*>(gradient), static_cast<const T*>(source),
                    static_cast<Accumulator<T>*>(workspace), positions_of_part(pass, parts));
    });
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
