// Gradient-descent steps over a list of tensors in one call.
#pragma once

#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

namespace cnnkernels {

// One parameter with its gradient and momentum buffer (null without momentum),
// all of `count` elements of one dtype in the same order in memory.
struct StepTensor {
  void* param;
  void* grad;
  void* momentum_buffer;
  int64_t count;
};

// The arguments of torch.optim.SGD. Plain gradient descent is the default.
struct StepOptions {
  double lr = 0;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
  bool first_step = false;  // the momentum buffers are written, not read
  bool unscale = false;     // grad /= grad_scale, in place, before all else
  double grad_scale = 1;
};

// How a list is cut into tasks: all of its tensors count as one row of elements.
struct GradientStepPlan {
  Isa isa = Isa::baseline;
  int threads = 0;
  std::vector<int64_t> ends;      // where each tensor ends in the row
  int64_t elements_per_task = 0;  // all of them where a list is not worth a second thread
  bool fetches_ahead = false;     // of a list that comes from memory
};

// A pure function of its arguments: of the tensors, their counts and which are the same.
GradientStepPlan plan_gradient_step(const std::vector<StepTensor>& tensors, Isa isa, int threads);

// Arithmetic is in float, in double for float64. Reference: the algorithm box
// of torch.optim.SGD (Sutskever et al., 2013, for momentum and nesterov).
void gradient_step(DType dtype, const GradientStepPlan& plan, const ThreadPool& pool,
                   const std::vector<StepTensor>& tensors, const StepOptions& options);

}  // namespace cnnkernels
