// The lists of tensors that the step kernels take in one call, for the operators and for the
// optimizers' eager entry points.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "kernels/gradient_step.h"

namespace cnnkernels {

// Tensors to be stepped, and the plan for them. A list that is filled again keeps its plan if
// it is given what it had before: parameters of the same data pointers and sizes, the same
// dtype, instruction set and number of threads, on which alone a plan depends. All else is read
// from the tensors each time. It holds no references: they must live until step() returns.
class StepList {
 public:
  // Begins the list of another step.
  void restart(DType dtype);

  // Adds tensors of that dtype and of one memory order; buffer is null without momentum. With
  // `unscale` the gradient is written too.
  void add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer, bool unscale);

  int64_t elements() const { return elements_; }

  // References to all that was added.
  std::vector<at::Tensor> references() const;

  // Bumps the version counters of all that it writes, and counts in `calls` unless there is
  // nothing to compute.
  void step(const StepOptions& options, std::atomic<int64_t>& calls);

 private:
  void* data_of(const at::Tensor& tensor, bool written);

  DType dtype_ = DType::float32;
  int64_t elements_ = 0;
  size_t size_ = 0;
  std::vector<StepTensor> tensors_;
  std::vector<c10::TensorImpl*> read_, written_;
  GradientStepPlan plan_;
  bool planned_ = false;
};

// Whether the dispatcher has nothing to decide in a step of these: dense CPU tensors of one dtype,
// size and memory order, and no subclass, lazy conjugation or wrapper of a transform.
bool is_ordinary_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer);

// Whether a dispatch mode, a transform or a profiler is to see the operators that are called.
bool operators_are_observed();

}  // namespace cnnkernels
