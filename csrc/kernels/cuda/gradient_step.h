// Gradient-descent steps over a list of tensors on a CUDA device: a launch for some hundred
// tensors.
#pragma once

#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/gradient_step.h"

namespace cnnkernels::cuda {

// Numbers that are only known on the device, each in place of one in StepOptions unless it is null.
struct StepScalars {
  const void* lr = nullptr;           // in the type in which the tensors are summed
  const float* grad_scale = nullptr;  // for options that unscale
  const float* found_inf = nullptr;   // unless it is zero, nothing is stepped
};

// The tensors [begin, end) of the list, each in chunks of the plan's size.
struct StepLaunch {
  size_t begin, end;
  int blocks;  // one a chunk
  bool few;    // the smaller of the two argument blocks holds them
};

struct GradientStepPlan {
  int chunk = 0;  // elements of a tensor that a block steps; a multiple of all vectors
  std::vector<StepLaunch> launches;
};

constexpr int kStepThreads = 256;
// Blocks that a multiprocessor runs at once, of those that its threads allow: with 64 registers a
// thread.
constexpr int kStepBlocks = 4;
// Tensors of a launch: with four numbers and a block each they are the kernel's arguments, of which
// there are at most kMostArgumentBytes. A launch copies all of them, so that short lists have a
// smaller block.
constexpr int kMostStepTensors = 640;
constexpr int kFewStepTensors = 64;

// A pure function of its arguments. counts: the elements of each tensor.
GradientStepPlan plan_gradient_step(const std::vector<int64_t>& counts, DType dtype,
                                    const DeviceLimits& limits);

// Semantics and arithmetic are gradient_step's on the CPU. Returns the first error of a launch.
Error gradient_step(DType dtype, const GradientStepPlan& plan,
                    const std::vector<StepTensor>& tensors, const StepOptions& options,
                    const StepScalars& scalars, Stream stream);

}  // namespace cnnkernels::cuda
