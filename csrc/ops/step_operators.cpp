// What gd_step_ and sgd_step_ do on every device.
#include "ops/step_operators.h"

namespace cnnkernels {
namespace {

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

void check_number(const char* op, const char* name, const std::optional<at::Tensor>& number) {
  TORCH_CHECK(!has_value(number) || number->numel() == 1, op, ": ", name,
              " must have one element, but has size ", number->sizes());
  TORCH_CHECK(!has_value(number) || !number->is_complex(), op, ": ", name,
              " must be real, but is of dtype ", number->scalar_type());
}

}  // namespace

StepOptions StepCall::on_host() const {
  StepOptions result = options;
  if (has_value(lr)) result.lr = lr->item<double>();
  if (has_value(grad_scale)) result.grad_scale = grad_scale->item<double>();
  return result;
}

void check_step(const StepCall& call, at::TensorList params, at::TensorList grads,
                at::TensorList momentum_buffers) {
  check_params(call.op, params);
  check_list(call.op, "grads", grads, params);
  if (call.options.momentum != 0) {
    check_list(call.op, "momentum_buffers", momentum_buffers, params);
  }
  check_number(call.op, "lr", call.lr);
  check_number(call.op, "grad_scale", call.grad_scale);
  check_number(call.op, "found_inf", call.found_inf);
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  return a.is_non_overlapping_and_dense() && a.strides() == b.strides();
}

void bump_version(c10::TensorImpl* tensor) {
  if (!tensor->is_inference()) tensor->bump_version();
}

void composed_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer,
                   const StepOptions& options) {
  bump_version(param.unsafeGetTensorImpl());
  if (buffer != nullptr) bump_version(buffer->unsafeGetTensorImpl());
  if (options.unscale) {
    bump_version(grad.unsafeGetTensorImpl());
    grad.div_(options.grad_scale);
  }
  at::Tensor direction = options.maximize ? grad.neg() : grad;
  if (options.weight_decay != 0) direction = direction.add(param, options.weight_decay);
  if (buffer != nullptr) {
    if (options.first_step) {
      buffer->copy_(direction);
    } else {
      buffer->mul_(options.momentum).add_(direction, 1 - options.dampening);
    }
    direction = options.nesterov ? direction.add(*buffer, options.momentum) : *buffer;
  }
  param.add_(direction, -options.lr);
}

}  // namespace cnnkernels
