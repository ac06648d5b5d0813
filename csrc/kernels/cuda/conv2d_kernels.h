// The convolution kernels, each by itself: no plan chooses between them yet, and no operator calls
// them. Pointers are to the problem's dtype; workspaces are aligned to 16 bytes.
#pragma once

#include <optional>

#include "kernels/cuda/convolution_pass.h"

namespace cnnkernels::cuda {

// How products of float32 are taken on tensor cores.
enum class TensorProducts : uint8_t {
  exact_parts,  // three products of TF32 parts
  tf32,         // one product of operands rounded to 11 bits
};

// Cuts the results of each phase into tiles of so many pixels, numbered through all phases; returns
// their number.
int64_t number_tiles(ConvolutionPass& pass, int pixels);

// bias may be null; `relu` clips what is stored.
Error direct_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                  const void* bias, void* result, bool relu, Stream stream);

// How the implicit matrix product goes.
struct GemmChoice {
  int tile;         // 128 or 64
  bool contiguous;  // chunks_are_contiguous
  TensorProducts products;
};

// Whether every 16 bytes of a pixel's channels lie in one piece, and aligned.
bool chunks_are_contiguous(const ConvolutionPass& pass, int64_t element_bytes, int64_t alignment);

int64_t packed_weight_bytes(const ConvolutionPass& pass, int64_t element_bytes);

// Not of float64. workspace has packed_weight_bytes.
Error implicit_gemm_pass(DType dtype, const GemmChoice& choice, ConvolutionPass pass,
                         const void* source, const void* weight, const void* bias, void* result,
                         bool relu, void* workspace, Stream stream);

// The weight's gradient, of the forward pass: `parts` of the output pixels have totals of their own
// in the workspace, weight_total_bytes in all.
int64_t weight_total_bytes(const ConvolutionPass& pass, int parts, DType dtype);
// Pixels of a part but the last.
int positions_of_part(const ConvolutionPass& pass, int parts);
// How the weight gradient goes on tensor cores.
struct WeightGradientChoice {
  TensorProducts products;
  bool gradient_contiguous, source_contiguous;  // as chunks_are_contiguous, of both
  int row_warps, column_warps;                  // of a block's 16; the others divide the pixels
  int results;                                  // pixels of a tile, at most; 0 where none fits
  int parts;                                    // as many as make sense
};
// Pure functions. `alignment` is that of both tensors.
WeightGradientChoice choose_weight_gradient(const ConvolutionPass& pass, DType dtype,
                                            TensorProducts products, int64_t alignment,
                                            const DeviceLimits& limits);
// The shared memory that a block takes, or nothing if offsets do not have 32 bits.
std::optional<int64_t> weight_gradient_shared_bytes(const ConvolutionPass& pass, DType dtype,
                                                    const WeightGradientChoice& choice);
// Not of float64; of a choice that fits.
Error weight_gradient_gemm(DType dtype, const WeightGradientChoice& choice,
                           const ConvolutionPass& pass, int parts, const void* gradient,
                           const void* source, void* grad_weight, void* workspace, Stream stream);
Error weight_gradient_plain(DType dtype, const ConvolutionPass& pass, int parts,
                            const void* gradient, const void* source, void* grad_weight,
                            void* workspace, Stream stream);

// Of few channels a group: the weights of a result channel, and of a block, fit in shared memory.
constexpr int kMostDepthwiseWeights = 4096;
// Whether the kernel of NHWC takes a pass.
bool depthwise_channels_apply(const ConvolutionPass& pass, int64_t element_bytes,
                              int64_t alignment);
// Vectors of channels of its block.
int depthwise_block_vectors(const ConvolutionPass& pass, int64_t element_bytes);
Error depthwise_pass(DType dtype, ConvolutionPass pass, bool channels, const void* source,
                     const void* weight, const void* bias, void* result, bool relu, Stream stream);
Error depthwise_weight_gradient(DType dtype, const ConvolutionPass& pass, int parts,
                                const void* gradient, const void* source, void* grad_weight,
                                void* workspace, Stream stream);
// Its first half; conv2d_weight_gradient.cu adds up the parts.
Error depthwise_weight_totals(DType dtype, const ConvolutionPass& pass, int parts,
                              const void* gradient, const void* source, void* totals,
                              Stream stream);

// The bias's gradient; `parts` of the images have totals in the workspace.
int64_t bias_total_bytes(const Conv2dProblem& problem, int parts);
Error bias_gradient(const Conv2dProblem& problem, int parts, const void* grad_output,
                    void* grad_bias, void* workspace, Stream stream);

}  // namespace cnnkernels::cuda
