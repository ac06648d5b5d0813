// Convolution, bias, ReLU and max pooling as one operator: the convolution's output
// stays in registers, in a scratch plane, or, in stages, in a buffer of few images.
#pragma once

#include "kernels/conv2d.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels {

// conv.out_* equals pool.in_*, conv.out_channels equals pool.channels; both
// share batch, dtype and layout.
struct Conv2dReluMaxPool2dProblem {
  Conv2dProblem conv;
  MaxPool2dProblem pool;
};

enum class BlockBackward : uint8_t {
  winners,         // each with its patch: conv2d_relu_max_pool2d_backward.inl
  windows,         // of weights, by rows of windows: ..._weight_gradient.inl
  neighbourhoods,  // all winners of a window together: ..._neighbourhoods.inl
  dense,           // through the gradient of the convolution's output and its own algorithms
};

inline const char* backward_name(BlockBackward backward) {
  switch (backward) {
    case BlockBackward::winners:
      return "winners";
    case BlockBackward::windows:
      return "windows";
    case BlockBackward::neighbourhoods:
      return "neighbourhoods";
    default:
      return "dense";
  }
}

// rows_per_task counts pooled rows.
struct Conv2dReluMaxPool2dPlan : Conv2dPlan {
  bool pool_in_registers;  // 2x2 windows at stride 2 close without leaving registers
  // The convolution of some images by its own plan, as many as a second-level cache
  // holds or one, then their pooling: where the cheapest algorithm pools nothing itself.
  bool staged;
  BlockBackward backward;        // of the weights and the bias
  BlockBackward input_backward;  // of the input, the same if it has one: windows have none
};

// The outer product does only what pools in registers.
Conv2dReluMaxPool2dPlan plan_block_forward(const Conv2dReluMaxPool2dProblem& problem,
                                           ConvAlgorithm algorithm, Isa isa, int threads);

// Whether the pixels that a window reads fit the registers: 3 rows of a kernel at
// stride 1, one group, and rows of few channels.
bool neighbourhoods_apply(const Conv2dReluMaxPool2dProblem& problem, Isa isa);

Conv2dReluMaxPool2dPlan plan_conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dProblem& problem,
                                                    Isa isa, int threads);

// bias and argmax may be null. Where the pooled value is positive or NaN, the
// argmax is the winning tap as in max_pool2d_forward; elsewhere no gradient
// passes and the tap is only some tap of the window.
void conv2d_relu_max_pool2d_forward(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                    const ThreadPool& pool, const void* input, const void* weight,
                                    const void* bias, void* output, void* argmax);

// The same by a plan that is given.
void conv2d_relu_max_pool2d_forward(const Conv2dReluMaxPool2dProblem& problem,
                                    const Conv2dReluMaxPool2dPlan& plan, const ThreadPool& pool,
                                    const void* input, const void* weight, const void* bias,
                                    void* output, void* argmax);

// What the backward needs for the gradient of the convolution's output.
int64_t block_backward_scratch_bytes(const Conv2dReluMaxPool2dProblem& problem,
                                     const Conv2dReluMaxPool2dPlan& plan);

// Any of the three gradients may be null. The argmax is that of the forward pass:
// windows that the ReLU clips pass none. `scratch` has block_backward_scratch_bytes.
void conv2d_relu_max_pool2d_backward(const Conv2dReluMaxPool2dProblem& problem,
                                     const Conv2dReluMaxPool2dPlan& plan, const ThreadPool& pool,
                                     const void* grad_output, const void* input, const void* weight,
                                     const void* argmax, void* grad_input, void* grad_weight,
                                     void* grad_bias, void* scratch);

}  // namespace cnnkernels
