// gd_step_ and sgd_step_: whole parameter lists in one call.
#include "ops/gradient_step.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {
namespace ops {

void gd_step_(at::TensorList params, at::TensorList grads, double lr) {
  static const auto op = typed_operator<decltype(gd_step_)>("cnnkernels::gd_step_");
  op.call(params, grads, lr);
}

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double weight_decay, double momentum, double lr, double dampening, bool nesterov,
               bool maximize, bool is_first_step, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf) {
  static const auto op = typed_operator<decltype(sgd_step_)>("cnnkernels::sgd_step_");
  op.call(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

}  // namespace ops

namespace {

// Whether two tensors enumerate their elements in the same order of memory.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  return a.is_non_overlapping_and_dense() && a.strides() == b.strides();
}

// What a step may change, before it changes anything. Inference tensors carry no
// autograd key, so that they are checked here.
void check_params(const char* op, at::TensorList params) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(!params[i].is_inference() || c10::InferenceMode::is_enabled(), op, ": params[", i,
                "] is an inference tensor, which only InferenceMode may change");
    TORCH_CHECK(
        at::isFloatingType(params[i].scalar_type()) || at::isComplexType(params[i].scalar_type()),
        op, ": params[", i, "] must be of a floating or complex dtype, but is ",
        params[i].scalar_type());
  }
}

void check_list(const char* op, const char* name, at::TensorList list, at::TensorList params) {
  TORCH_CHECK(list.size() == params.size(), op, ": ", name,
              " must have as many tensors as params, ", params.size(), ", but has ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK(list[i].sizes() == params[i].sizes(), op, ": ", name, "[", i,
                "] must have the size of params[", i, "], ", params[i].sizes(), ", but has ",
                list[i].sizes());
    TORCH_CHECK(list[i].device() == params[i].device(), op, ": ", name, "[", i,
                "] must be on the device of params[", i, "], ", params[i].device(), ", but is on ",
                list[i].device());
    TORCH_CHECK(c10::canCast(list[i].scalar_type(), params[i].scalar_type()), op, ": ", name, "[",
                i, "] of ", list[i].scalar_type(), " cannot step params[", i, "] of ",
                params[i].scalar_type());
  }
}

// As torch's in-place operations on leaves.
void check_mutable(const char* op, at::TensorList params) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && params[i].requires_grad()), op, ": params[", i,
                "] requires grad: a step changes it in place, so call it under torch.no_grad()");
  }
}

// One parameter in torch's own operations, for what the kernel does not cover.
void composed_step(at::Tensor param, at::Tensor grad, const at::Tensor& buffer,
                   const StepOptions& options) {
  if (options.unscale) grad.div_(options.grad_scale);
  at::Tensor direction = options.maximize ? grad.neg() : grad;
  if (options.weight_decay != 0) direction = direction.add(param, options.weight_decay);
  if (options.momentum != 0) {
    at::Tensor momentum_buffer = buffer;
    if (options.first_step) {
      momentum_buffer.copy_(direction);
    } else {
      momentum_buffer.mul_(options.momentum).add_(direction, 1 - options.dampening);
    }
    direction =
        options.nesterov ? direction.add(momentum_buffer, options.momentum) : momentum_buffer;
  }
  param.add_(direction, -options.lr);
}

// Neither a raw pointer nor an operation below autograd leaves a trace: without this a saved
// parameter would give wrong gradients in silence.
void bump_version(c10::TensorImpl* tensor) {
  if (!tensor->is_inference()) tensor->bump_version();
}

void step(const char* op, at::TensorList params, at::TensorList grads,
          at::TensorList momentum_buffers, const StepOptions& options,
          std::atomic<int64_t>& calls) {
  check_params(op, params);
  check_list(op, "grads", grads, params);
  if (options.momentum != 0) check_list(op, "momentum_buffers", momentum_buffers, params);
  constexpr int kDTypes = 4;
  StepList lists[kDTypes];
  for (int dtype = 0; dtype < kDTypes; ++dtype) lists[dtype].restart(static_cast<DType>(dtype));
  std::vector<size_t> composed;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    const at::Tensor* const buffer = options.momentum != 0 ? &momentum_buffers[i] : nullptr;
    const auto native = [&](const at::Tensor& other) {
      return not_native(other).empty() && other.scalar_type() == param.scalar_type() &&
             same_order(param, other);
    };
    if (native(param) && native(grads[i]) && (buffer == nullptr || native(*buffer))) {
      lists[static_cast<int>(dtype_of(param))].add(param, grads[i], buffer, options.unscale);
    } else {
      composed.push_back(i);
    }
  }
  for (const size_t i : composed) {
    const at::Tensor buffer = options.momentum != 0 ? momentum_buffers[i] : at::Tensor();
    bump_version(params[i].unsafeGetTensorImpl());
    if (buffer.defined()) bump_version(buffer.unsafeGetTensorImpl());
    if (options.unscale) bump_version(grads[i].unsafeGetTensorImpl());
    composed_step(params[i], grads[i], buffer, options);
  }
  for (StepList& list : lists) list.step(options, calls);
}

void gd_step(at::TensorList params, at::TensorList grads, double lr) {
  StepOptions options;
  options.lr = lr;
  step("gd_step_", params, grads, {}, options, kernel_calls().gd_step);
}

void sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
              double weight_decay, double momentum, double lr, double dampening, bool nesterov,
              bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf) {
  if (has_value(found_inf) && found_inf->item<double>() != 0) return;
  StepOptions options;
  options.lr = lr;
  options.momentum = momentum;
  options.dampening = dampening;
  options.weight_decay = weight_decay;
  options.nesterov = nesterov;
  options.maximize = maximize;
  options.first_step = is_first_step;
  options.unscale = has_value(grad_scale);
  if (options.unscale) options.grad_scale = grad_scale->item<double>();
  step("sgd_step_", params, grads, momentum_buffers, options, kernel_calls().sgd_step);
}

void autograd_gd_step(at::TensorList params, at::TensorList grads, double lr) {
  check_mutable("gd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::gd_step_(params, grads, lr);
}

void autograd_sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                       double weight_decay, double momentum, double lr, double dampening,
                       bool nesterov, bool maximize, bool is_first_step,
                       const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf) {
  check_mutable("sgd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::sgd_step_(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
                 maximize, is_first_step, grad_scale, found_inf);
}

}  // namespace

void StepList::restart(DType dtype) {
  planned_ = planned_ && dtype == dtype_;
  dtype_ = dtype;
  elements_ = 0;
  size_ = 0;
  read_.clear();
  written_.clear();
}

void* StepList::data_of(const at::Tensor& tensor, bool written) {
  (written ? written_ : read_).push_back(tensor.unsafeGetTensorImpl());
  return written ? written_data(tensor) : const_cast<void*>(read_data(tensor));
}

void StepList::add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer,
                   bool unscale) {
  const StepTensor tensor = {data_of(param, true), data_of(grad, unscale),
                             buffer != nullptr ? data_of(*buffer, true) : nullptr, param.numel()};
  elements_ += tensor.count;
  if (size_ == tensors_.size()) {
    planned_ = false;
    tensors_.push_back(tensor);
  } else {
    const StepTensor& before = tensors_[size_];
    planned_ = planned_ && tensor.param == before.param && tensor.count == before.count;
    tensors_[size_] = tensor;
  }
  ++size_;
}

std::vector<at::Tensor> StepList::references() const {
  std::vector<at::Tensor> result;
  result.reserve(read_.size() + written_.size());
  for (const auto* const tensors : {&read_, &written_}) {
    for (c10::TensorImpl* const tensor : *tensors) {
      result.emplace_back(
          c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(tensor));
    }
  }
  return result;
}

void StepList::step(const StepOptions& options, std::atomic<int64_t>& calls) {
  for (c10::TensorImpl* const tensor : written_) bump_version(tensor);
  if (elements_ == 0) return;
  const ThreadPool pool = torch_thread_pool();
  const Isa isa = active_isa();
  if (!planned_ || size_ != tensors_.size() || plan_.isa != isa || plan_.threads != pool.threads) {
    tensors_.resize(size_);
    plan_ = plan_gradient_step(tensors_, isa, pool.threads);
    planned_ = true;
  }
  count(calls);
  gradient_step(dtype_, plan_, pool, tensors_, options);
}

bool is_ordinary_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer) {
  static const c10::DispatchKeySet ordinary = at::empty({0}, at::kCPU).key_set();
  const auto like_param = [&](const at::Tensor& other) {
    return other.key_set() == ordinary && other.scalar_type() == param.scalar_type() &&
           other.sizes() == param.sizes() && same_order(param, other);
  };
  return param.key_set() == ordinary && like_param(grad) &&
         (buffer == nullptr || like_param(*buffer));
}

bool operators_are_observed() {
  return c10::impl::tls_local_dispatch_key_set().included_ != c10::default_included_set ||
         at::hasCallbacks();
}

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) {
  m.impl("gd_step_", gd_step);
  m.impl("sgd_step_", sgd_step);
}
TORCH_LIBRARY_IMPL(cnnkernels, Autograd, m) {
  m.impl("gd_step_", autograd_gd_step);
  m.impl("sgd_step_", autograd_sgd_step);
}

}  // namespace cnnkernels
