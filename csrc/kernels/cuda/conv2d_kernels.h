// The convolution kernels, each by itself; conv2d.h has the plans that choose between them.
// Pointers are to the problem's dtype; workspaces are aligned to 16 bytes.
#pragma once

#include <optional>

#include "kernels/cuda/convolution_pass.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels::cuda {

// How products of float32 are taken on tensor cores.
enum class TensorProducts : uint8_t {
  exact_parts,  // three products of TF32 parts
  tf32,         // one product of operands rounded to 11 bits
};

// Cuts the results of each phase into tiles of so many pixels, numbered through all phases; returns
// their number.
int64_t number_tiles(ConvolutionPass& pass, int pixels);

// bias may be null; `relu` clips what is stored; alignment: bytes of which the result's address is
// a multiple. With a pool, one that pools_in_block, the pooled results are stored, and their
// winners in argmax, which may be null.
Error direct_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                  const void* bias, void* result, bool relu, int64_t alignment,
                  const MaxPool2dProblem* pool, void* argmax, Stream stream);

// How the implicit matrix product goes.
struct GemmChoice {
  int rows, columns;  // of a tile: 64 x 64, 128 x 64 or 128 x 128
  TensorProducts products;
  bool contiguous;     // every 16 bytes of a source pixel's channels lie in one piece
  bool aligned;        // to 16 bytes: the result
  bool packs_weights;  // the weights' do not lie so
};

// The choices that follow from where tensors lie; alignment: bytes of which all tensors' addresses
// are multiples.
GemmChoice make_gemm_choice(const ConvolutionPass& pass, DType dtype, int rows, int columns,
                            TensorProducts products, int64_t alignment);

// The weights as [group][result channel][tap][source channel], with zeros behind the last channel
// up to 16 bytes, and how many bytes that takes. Not of float64.
int64_t packed_weight_bytes(const ConvolutionPass& pass, int64_t element_bytes);
Error pack_weights(DType dtype, const ConvolutionPass& pass, const void* weight, void* packed,
                   Stream stream);

// What a block takes of shared memory: more than any device has where offsets exceed 32 bits. The
// pool may be null.
int64_t gemm_shared_bytes(ConvolutionPass pass, DType dtype, const GemmChoice& choice,
                          const MaxPool2dProblem* pool);

// Not of float64. bias may be null. With a pool, one that pools_in_block, the pooled results are
// stored, and their winners in argmax, which may be null. The workspace has packed_weight_bytes if
// the choice packs weights.
Error implicit_gemm_pass(DType dtype, const GemmChoice& choice, ConvolutionPass pass,
                         const void* source, const void* weight, const void* bias, void* result,
                         bool relu, const MaxPool2dProblem* pool, void* argmax, void* workspace,
                         Stream stream);

// By warpgroup products of sm_90a: whether they take a pass, whose source has this alignment. Code
// for other architectures lacks the kernel, and a launch of it is an error.
bool wgmma_applies(const ConvolutionPass& pass, DType dtype, int64_t alignment,
                   const DeviceLimits& limits);
// workspace has packed_weight_bytes.
Error wgmma_pass(DType dtype, const ConvolutionPass& pass, const void* source, const void* weight,
                 const void* bias, void* result, bool relu, void* workspace, Stream stream);

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
// How they read is chosen by the tensors' addresses.
Error depthwise_pass(DType dtype, ConvolutionPass pass, const void* source, const void* weight,
                     const void* bias, void* result, bool relu, Stream stream);
// Parts that give each multiprocessor some blocks, of enough pixels to be worth their reduction.
int depthwise_weight_parts(DType dtype, const ConvolutionPass& pass, int multiprocessors);
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
