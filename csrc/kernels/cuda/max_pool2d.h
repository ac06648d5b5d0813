// 2-D max pooling on a CUDA device. Problems, semantics and the argmax are those of
// kernels/max_pool2d.h.
#pragma once

#include <string>

#include "kernels/cuda/device.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels::cuda {

enum class PoolAlgorithm : uint8_t {
  // A thread takes neighbouring windows of a row of a plane: 2x2 and 3x3 windows at stride 2, NCHW.
  strips,
  // A thread takes one window, of as many neighbouring channels as one access holds in NHWC.
  windows,
};

struct MaxPool2dPlan {
  const char* algorithm;
  PoolAlgorithm kind;
  int width;  // windows of a strip; channels of an access
  LaunchGrid forward, backward;
  LaunchGrid each_window;  // one channel a thread: indices and gather
};

constexpr int kPoolThreads = 256;
// Blocks that a multiprocessor runs at once: with 64 registers a thread. (Left to itself ptxas
// keeps to 32 or 40 registers, where that costs it a spill.)
constexpr int kPoolBlocks = 4;

// Why no kernel takes a problem; empty if one does.
std::string max_pool2d_not_native(const MaxPool2dProblem& problem);

// A pure function of its arguments. alignment: bytes of which all tensors' addresses are multiples.
MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& problem, int64_t alignment,
                              const DeviceLimits& limits);

// argmax may be null; else it is uint8_t* or int32_t*, as compact_argmax() says. `clips`: windows
// whose maximum is not positive have no winner, as those of a ReLU's result.
Error max_pool2d_forward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                         const void* input, void* output, void* argmax, Stream stream,
                         bool clips = false);

// Adds each output gradient to its window's winner, in the order of the windows; writes all of
// grad_input. A tap that is none of its window's adds to nothing.
Error max_pool2d_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                          const void* grad_output, const void* argmax, void* grad_input,
                          Stream stream);

// values[i] = input at the winner of window i, or 0 if it has none, or NaN for a tap that is none
// of its window's: the device cannot raise.
Error max_pool2d_gather(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                        const void* input, const void* argmax, void* values, Stream stream);

// torch's indices: the winner's position y * in_width + x in its plane, or -1.
Error max_pool2d_indices(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                         const void* argmax, int64_t* indices, Stream stream);

}  // namespace cnnkernels::cuda
