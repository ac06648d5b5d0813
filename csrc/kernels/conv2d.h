// 2-D convolution: the problem, the plan for it, and the entry points.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

namespace cnnkernels {

// How exactly float32 is multiplied, as torch.set_float32_matmul_precision names it.
// highest: as float32; high: with at least 16 bits, medium: with 8, where that is
// faster.
enum class Float32Precision : uint8_t { highest, high, medium };

// output[n,k,y,x] = bias[k] + sum over c,r,s of
//   weight[k,c,r,s] * input[n, g(k)*C/G + c, y*stride_h + r*dilation_h - pad_top,
//                           x*stride_w + s*dilation_w - pad_left]
// with input = 0 outside of the image. Input, output and their gradients are
// dense in `layout`; the weight has the strides given (in elements).
struct Conv2dProblem {
  int64_t batch;
  int64_t in_channels;   // C, over all groups
  int64_t out_channels;  // K, over all groups
  int64_t groups;
  int64_t in_height, in_width;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // "same" may pad more below and to the right
  int64_t dilation_h, dilation_w;
  int64_t weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s;
  DType dtype;
  Layout layout;
  Float32Precision precision = Float32Precision::highest;
  bool relu = false;  // of each output, as it is stored; only the forward pass reads it

  int64_t multiply_adds() const {
    return batch * out_channels * out_height * out_width * (in_channels / groups) * kernel_height *
           kernel_width;
  }
};

enum class ConvAlgorithm : uint8_t {
  direct,         // vectors along the rows: conv2d_direct.inl, conv2d_weight_gradient.inl
  outer_product,  // vectors along the channels: conv2d_outer_product.inl
  depthwise,      // one channel a group, or few: conv2d_depthwise.inl
  winograd,       // 3x3 kernels with fewer products: conv2d_winograd.inl
  amx,            // products of bfloat16 parts on matrix tiles: conv2d_amx.inl
  patches,        // few output pixels: conv2d_patches.inl
  runs,           // a weight gradient that is read where it lies: conv2d_runs_weight_gradient.inl
};

inline const char* algorithm_name(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::direct:
      return "direct";
    case ConvAlgorithm::outer_product:
      return "outer product";
    case ConvAlgorithm::winograd:
      return "winograd";
    case ConvAlgorithm::amx:
      return "amx";
    case ConvAlgorithm::patches:
      return "patches";
    case ConvAlgorithm::runs:
      return "runs";
    default:
      return "depthwise";
  }
}

// In which order matrix tiles go over a pass: conv2d_amx.inl.
enum class AmxOrder : uint8_t {
  chunks,      // of the source, each with all weights
  few_pixels,  // all of the source with each weight once
  pointwise,   // 32 pixels at a time, packed while the 32 before are multiplied
  in_place,    // the same of bfloat16 that need no packing
  row_runs,    // of few channels, the taps of a kernel row at a time
};

// Which algorithm runs and how it is cut up; a pure function of the problem,
// the instruction set and the number of threads.
struct Conv2dPlan {
  ConvAlgorithm algorithm;
  Isa isa;
  int vector_lanes;
  int threads;               // 1: the call stays on its own thread
  int64_t images_per_chunk;  // images packed at a time
  int64_t rows_per_task;     // output rows in one task; winograd: tiles of 2x2 outputs
  int64_t channels_per_task;
  int parts;  // amx: bfloat16 of which an element is the sum
  AmxOrder amx_order;
  int64_t channels_per_slice;  // few_pixels: source channels packed at a time
  bool in_place;               // reads the input where it lies, without packing
  bool weights_first;          // outer_product: all pixels with some weights, then the next
  int64_t workspace_bytes;
};

Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Isa isa, int threads);
Conv2dPlan plan_conv2d_input_gradient(const Conv2dProblem& problem, Isa isa, int threads);
Conv2dPlan plan_conv2d_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads);

// Whether the depthwise kernels take a problem: one channel a group, or, in NHWC, 2, 4 or 8
// of them; in NHWC at least a vector of channels in all.
bool depthwise_applies(const Conv2dProblem& problem, Isa isa);

// Whether Winograd's algorithm takes the forward pass and the input gradient.
bool winograd_applies(const Conv2dProblem& problem);

// Whether whole patches are multiplied by weights where they lie: few output pixels, one
// group, and weights of a channel without gaps.
bool patches_apply(const Conv2dProblem& problem);

// Whether a weight gradient can be read where it lies: float32 or float64 in NHWC, one group,
// undilated rows, and a vector of channels on one side.
bool runs_apply(const Conv2dProblem& problem, Isa isa);

// Whether matrix tiles take a problem.
bool amx_applies(const Conv2dProblem& problem, Isa isa);

// The same for an algorithm that is given; a planner chooses between these.
Conv2dPlan plan_forward(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                        int threads);
Conv2dPlan plan_input_gradient(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                               int threads);
Conv2dPlan plan_weight_gradient(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                                int threads);

// The algorithm that takes fewer cycles, by an estimate, for a forward pass that
// stores rows x columns results, each of so many pixels.
ConvAlgorithm cheaper_forward(const Conv2dProblem& problem, Isa isa, int64_t rows, int64_t columns,
                              int64_t pixels);

// Runs a plan. bias may be null.
void conv2d_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output);
void conv2d_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const ThreadPool& pool, const void* grad_output, const void* weight,
                           void* grad_input);
void conv2d_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const ThreadPool& pool, const void* grad_output, const void* input,
                            void* grad_weight);

// Plans and runs. bias may be null.
void conv2d_forward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output);

// Any of the three gradients may be null. grad_weight has the weight's strides.
void conv2d_backward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                     const void* grad_output, const void* input, const void* weight,
                     void* grad_input, void* grad_weight, void* grad_bias);

}  // namespace cnnkernels
