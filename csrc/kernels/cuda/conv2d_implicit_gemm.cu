// The implicit matrix product's choices, and the copy of weights that it reads.
#include <algorithm>
#include <limits>

#include "kernels/cuda/conv2d_implicit_gemm.cuh"

namespace cnnkernels::cuda {
namespace {

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

template <class T>
Error pack_elements(const ConvolutionPass& pass, const void* weight, void* packed, Stream stream) {
  const int64_t elements = packed_weight_bytes(pass, sizeof(T)) / static_cast<int64_t>(sizeof(T));
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(std::min(kMostBlocksX, ceil_div(elements, kPackThreads)));
  grid.block_x = kPackThreads;
  return launch(pack_weights_kernel<T>, grid, 0, stream, pass, static_cast<const T*>(weight),
                static_cast<T*>(packed),
                static_cast<int>(round_up(pass.source_channels, kChunkElements<T>)));
}

// The strides of packed weights.
void read_packed(ConvolutionPass& pass, int64_t element_bytes) {
  pass.weight_stride_source = 1;
  pass.weight_stride_s =
      round_up(pass.source_channels * element_bytes, kChunkBytes) / element_bytes;
  pass.weight_stride_r = pass.kernel_width * pass.weight_stride_s;
  pass.weight_stride_result = pass.kernel_height * pass.weight_stride_r;
  pass.weight_stride_group = pass.result_channels * pass.weight_stride_result;
}

// Whether the weights' source channels are whole chunks, each in one piece.
bool weights_are_chunks(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment) {
  const int64_t elements = kChunkBytes / element_bytes;
  return pass.weight_stride_source == 1 && alignment % kChunkBytes == 0 &&
         pass.source_channels % elements == 0 && pass.weight_stride_group % elements == 0 &&
         pass.weight_stride_result % elements == 0 && pass.weight_stride_r % elements == 0 &&
         pass.weight_stride_s % elements == 0;
}

Error run_products(DType dtype, const GemmChoice& choice, const PassCall& call) {
  if (dtype == DType::float16) return launch_gemm<Products16<float16>>(call, choice);
  if (dtype == DType::bfloat16) return launch_gemm<Products16<bfloat16>>(call, choice);
  return choice.products == TensorProducts::tf32 ? launch_gemm<ProductsTf32>(call, choice)
                                                 : launch_gemm<ProductsOfParts>(call, choice);
}

}  // namespace

int64_t packed_weight_bytes(const ConvolutionPass& pass, int64_t element_bytes) {
  return int64_t{pass.groups} * pass.result_channels * pass.kernel_taps() *
         round_up(pass.source_channels * element_bytes, kChunkBytes);
}

Error pack_weights(DType dtype, const ConvolutionPass& pass, const void* weight, void* packed,
                   Stream stream) {
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    error = pack_elements<decltype(element)>(pass, weight, packed, stream);
  });
  return error;
}

GemmChoice make_gemm_choice(const ConvolutionPass& pass, DType dtype, int rows, int columns,
                            TensorProducts products, int64_t alignment) {
  const int64_t bytes = element_size(dtype);
  GemmChoice choice = {};
  choice.rows = rows;
  // The sums and parts of 128 x 128 results are more registers than a thread has.
  const bool parts = dtype == DType::float32 && products == TensorProducts::exact_parts;
  choice.columns = parts ? std::min(columns, 64) : columns;
  choice.products = products;
  choice.contiguous = chunks_are_contiguous(pass, bytes, alignment);
  choice.aligned = alignment % kVectorBytes == 0;
  choice.packs_weights = !weights_are_chunks(pass, bytes, alignment);
  return choice;
}

int64_t gemm_shared_bytes(ConvolutionPass pass, DType dtype, const GemmChoice& choice,
                          const MaxPool2dProblem* pool) {
  if (choice.packs_weights) read_packed(pass, element_size(dtype));
  const SourcePatch patch = make_source_patch(pass, choice.rows, pool);
  if (!patch_is_addressable(pass, patch)) return std::numeric_limits<int64_t>::max();
  return dtype == DType::float32 ? gemm_shared<float>(pass, patch, choice).bytes
                                 : gemm_shared<float16>(pass, patch, choice).bytes;
}

Error implicit_gemm_pass(DType dtype, const GemmChoice& choice, ConvolutionPass pass,
                         const void* source, const void* weight, const void* bias, void* result,
                         bool relu, const MaxPool2dProblem* pool, void* argmax, void* workspace,
                         Stream stream) {
  if (choice.packs_weights) {
    const Error error = pack_weights(dtype, pass, weight, workspace, stream);
    if (error != kSuccess) return error;
    read_packed(pass, element_size(dtype));
    weight = workspace;
  }
  const SourcePatch patch = make_source_patch(pass, choice.rows, pool);
  BlockPool pooled = {};
  bool vectors = false;
  if (pool != nullptr) {
    pooled = block_pool(*pool, argmax);
    store_pooled(pass, *pool);
  } else {
    vectors = choice.aligned && results_are_vectors(pass, patch, element_size(dtype), kVectorBytes);
  }
  const PassCall call = {pass,   patch,   source,
                         weight, bias,    result,
                         relu,   vectors, pool != nullptr ? &pooled : nullptr,
                         stream};
  return run_products(dtype, choice, call);
}

}  // namespace cnnkernels::cuda
