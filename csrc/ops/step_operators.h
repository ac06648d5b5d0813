// gd_step_ and sgd_step_ on a device: arguments and what the kernels leave are the same on all.
//
// Lists take the tensors that a device's kernels step:
//   Lists(call)                    StepCall: the numbers of the step
//   static takes(number)           whether a number may stay the tensor that it is
//   add(param, grad, buffer)       false where the kernels do not apply; buffer may be null
//   step(calls)                    steps what was added, and counts
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

#include "kernels/gradient_step.h"
#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/gradient_step.h"
#include "ops/operators.h"

namespace cnnkernels {

// The numbers of a step: in the options, unless they are tensors.
struct StepCall {
  const char* op;
  StepOptions options;
  std::optional<at::Tensor> lr, grad_scale, found_inf;

  // Whether nothing is to be stepped. Waits for the device that the number is on.
  bool skips() const { return has_value(found_inf) && found_inf->item<double>() != 0; }
  // The options with all numbers. Waits likewise.
  StepOptions on_host() const;
};

// Raise before anything is changed.
void check_step(const StepCall& call, at::TensorList params, at::TensorList grads,
                at::TensorList momentum_buffers);

// Whether two tensors enumerate their elements in the same order of memory.
bool same_order(const at::Tensor& a, const at::Tensor& b);

// Neither a raw pointer nor an operation below autograd leaves a trace: without this a saved
// parameter would give wrong gradients in silence.
void bump_version(c10::TensorImpl* tensor);

// One parameter in torch's own operations, for what the kernels do not cover.
void composed_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer,
                   const StepOptions& options);

template <class Lists>
class StepOperators {
 public:
  static void add_to(torch::Library& library) {
    library.impl("gd_step_", gd_step);
    library.impl("gd_step_.tensor_lr", gd_step_tensor_lr);
    library.impl("sgd_step_", sgd_step);
    library.impl("sgd_step_.tensor_lr", sgd_step_tensor_lr);
  }

 private:
  static void step(StepCall call, at::TensorList params, at::TensorList grads,
                   at::TensorList momentum_buffers, std::atomic<int64_t>& calls) {
    check_step(call, params, grads, momentum_buffers);
    const bool with_buffers = call.options.momentum != 0;
    if (has_value(call.lr) && !Lists::takes(*call.lr)) {
      call.options.lr = call.lr->item<double>();
      call.lr.reset();
    }
    if (has_value(call.grad_scale) && !Lists::takes(*call.grad_scale)) {
      call.options.grad_scale = call.grad_scale->item<double>();
      call.grad_scale.reset();
    }
    if (has_value(call.found_inf) && !Lists::takes(*call.found_inf)) {
      if (call.skips()) return;
      call.found_inf.reset();
    }
    Lists lists(call);
    std::vector<size_t> composed;
    for (size_t i = 0; i < params.size(); ++i) {
      if (!lists.add(params[i], grads[i], with_buffers ? &momentum_buffers[i] : nullptr)) {
        composed.push_back(i);
      }
    }
    if (!composed.empty()) step_composed(call, params, grads, momentum_buffers, composed);
    lists.step(calls);
  }

  static void step_composed(const StepCall& call, at::TensorList params, at::TensorList grads,
                            at::TensorList momentum_buffers, const std::vector<size_t>& which) {
    if (call.skips()) return;
    const StepOptions options = call.on_host();
    for (const size_t i : which) {
      composed_step(params[i], grads[i], options.momentum != 0 ? &momentum_buffers[i] : nullptr,
                    options);
    }
  }

  static void gd_step(at::TensorList params, at::TensorList grads, double lr) {
    StepCall call{"gd_step_", {}, {}, {}, {}};
    call.options.lr = lr;
    step(call, params, grads, {}, kernel_calls().gd_step);
  }

  static void gd_step_tensor_lr(at::TensorList params, at::TensorList grads, const at::Tensor& lr) {
    step({"gd_step_", {}, lr, {}, {}}, params, grads, {}, kernel_calls().gd_step);
  }

  static StepCall sgd_call(double weight_decay, double momentum, double dampening, bool nesterov,
                           bool maximize, bool is_first_step,
                           const std::optional<at::Tensor>& grad_scale,
                           const std::optional<at::Tensor>& found_inf) {
    StepCall call{"sgd_step_", {}, {}, grad_scale, found_inf};
    call.options.momentum = momentum;
    call.options.dampening = dampening;
    call.options.weight_decay = weight_decay;
    call.options.nesterov = nesterov;
    call.options.maximize = maximize;
    call.options.first_step = is_first_step;
    call.options.unscale = has_value(grad_scale);
    return call;
  }

  static void sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                       double weight_decay, double momentum, double lr, double dampening,
                       bool nesterov, bool maximize, bool is_first_step,
                       const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf) {
    StepCall call = sgd_call(weight_decay, momentum, dampening, nesterov, maximize, is_first_step,
                             grad_scale, found_inf);
    call.options.lr = lr;
    step(call, params, grads, momentum_buffers, kernel_calls().sgd_step);
  }

  static void sgd_step_tensor_lr(at::TensorList params, at::TensorList grads,
                                 at::TensorList momentum_buffers, double weight_decay,
                                 double momentum, const at::Tensor& lr, double dampening,
                                 bool nesterov, bool maximize, bool is_first_step,
                                 const std::optional<at::Tensor>& grad_scale,
                                 const std::optional<at::Tensor>& found_inf) {
    StepCall call = sgd_call(weight_decay, momentum, dampening, nesterov, maximize, is_first_step,
                             grad_scale, found_inf);
    call.lr = lr;
    step(call, params, grads, momentum_buffers, kernel_calls().sgd_step);
  }
};

}  // namespace cnnkernels
