// The operators as C++ functions: each finds its own in the dispatcher once.
#include "ops/operators.h"

#include "ops/dispatch.h"

namespace cnnkernels::ops {

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups) {
  static const auto op = typed_operator<decltype(conv2d)>("cnnkernels::conv2d");
  return op.call(input, weight, bias, stride, padding, dilation, groups);
}

at::Tensor conv2d_padding(const at::Tensor& input, const at::Tensor& weight,
                          const OptionalTensor& bias, at::IntArrayRef stride,
                          std::string_view padding, at::IntArrayRef dilation, int64_t groups) {
  static const auto op = typed_operator<decltype(conv2d_padding)>("cnnkernels::conv2d", "padding");
  return op.call(input, weight, bias, stride, padding, dilation, groups);
}

at::Tensor conv2d_relu(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups) {
  static const auto op = typed_operator<decltype(conv2d_relu)>("cnnkernels::conv2d_relu");
  return op.call(input, weight, bias, stride, padding, dilation, groups);
}

at::Tensor conv2d_relu_padding(const at::Tensor& input, const at::Tensor& weight,
                               const OptionalTensor& bias, at::IntArrayRef stride,
                               std::string_view padding, at::IntArrayRef dilation, int64_t groups) {
  static const auto op =
      typed_operator<decltype(conv2d_relu_padding)>("cnnkernels::conv2d_relu", "padding");
  return op.call(input, weight, bias, stride, padding, dilation, groups);
}

TensorTriple conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& weight, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             std::array<bool, 3> output_mask) {
  static const auto op = typed_operator<decltype(conv2d_backward)>("cnnkernels::conv2d_backward");
  return op.call(grad_output, input, weight, stride, padding, dilation, groups, output_mask);
}

at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op = typed_operator<decltype(max_pool2d)>("cnnkernels::max_pool2d");
  return op.call(input, kernel_size, stride, padding, dilation, ceil_mode);
}

TensorPair max_pool2d_with_indices(const at::Tensor& input, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op =
      typed_operator<decltype(max_pool2d_with_indices)>("cnnkernels::max_pool2d_with_indices");
  return op.call(input, kernel_size, stride, padding, dilation, ceil_mode);
}

TensorPair max_pool2d_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op =
      typed_operator<decltype(max_pool2d_argmax)>("cnnkernels::max_pool2d_argmax");
  return op.call(input, kernel_size, stride, padding, dilation, ceil_mode);
}

at::Tensor max_pool2d_backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                               c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op =
      typed_operator<decltype(max_pool2d_backward)>("cnnkernels::max_pool2d_backward");
  return op.call(grad_output, argmax, input_size, kernel_size, stride, padding, dilation,
                 ceil_mode);
}

at::Tensor max_pool2d_gather(const at::Tensor& input, const at::Tensor& argmax,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op =
      typed_operator<decltype(max_pool2d_gather)>("cnnkernels::max_pool2d_gather");
  return op.call(input, argmax, kernel_size, stride, padding, dilation, ceil_mode);
}

at::Tensor conv2d_relu_max_pool2d(const at::Tensor& input, const at::Tensor& weight,
                                  const OptionalTensor& bias, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                                  at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                                  bool pool_ceil_mode) {
  static const auto op =
      typed_operator<decltype(conv2d_relu_max_pool2d)>("cnnkernels::conv2d_relu_max_pool2d");
  return op.call(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
                 pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
}

at::Tensor conv2d_relu_max_pool2d_padding(const at::Tensor& input, const at::Tensor& weight,
                                          const OptionalTensor& bias, at::IntArrayRef stride,
                                          std::string_view padding, at::IntArrayRef dilation,
                                          int64_t groups, at::IntArrayRef pool_kernel_size,
                                          at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                          at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
  static const auto op = typed_operator<decltype(conv2d_relu_max_pool2d_padding)>(
      "cnnkernels::conv2d_relu_max_pool2d", "padding");
  return op.call(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
                 pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
}

TensorPair conv2d_relu_max_pool2d_argmax(const at::Tensor& input, const at::Tensor& weight,
                                         const OptionalTensor& bias, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, at::IntArrayRef pool_kernel_size,
                                         at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                         at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
  static const auto op = typed_operator<decltype(conv2d_relu_max_pool2d_argmax)>(
      "cnnkernels::conv2d_relu_max_pool2d_argmax");
  return op.call(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
                 pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
}

TensorTriple conv2d_relu_max_pool2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& argmax, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_kernel_size,
    at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
    bool pool_ceil_mode, std::array<bool, 3> output_mask) {
  static const auto op = typed_operator<decltype(conv2d_relu_max_pool2d_backward)>(
      "cnnkernels::conv2d_relu_max_pool2d_backward");
  return op.call(grad_output, input, weight, argmax, stride, padding, dilation, groups,
                 pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode,
                 output_mask);
}

void gd_step_(at::TensorList params, at::TensorList grads, double lr) {
  static const auto op =
      typed_operator<void(at::TensorList, at::TensorList, double)>("cnnkernels::gd_step_");
  op.call(params, grads, lr);
}

void gd_step_(at::TensorList params, at::TensorList grads, const at::Tensor& lr) {
  using Signature = void(at::TensorList, at::TensorList, const at::Tensor&);
  static const auto op = typed_operator<Signature>("cnnkernels::gd_step_", "tensor_lr");
  op.call(params, grads, lr);
}

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double weight_decay, double momentum, const at::Tensor& lr, double dampening,
               bool nesterov, bool maximize, bool is_first_step, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf) {
  using Signature =
      void(at::TensorList, at::TensorList, at::TensorList, double, double, const at::Tensor&,
           double, bool, bool, bool, const OptionalTensor&, const OptionalTensor&);
  static const auto op = typed_operator<Signature>("cnnkernels::sgd_step_", "tensor_lr");
  op.call(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double weight_decay, double momentum, double lr, double dampening, bool nesterov,
               bool maximize, bool is_first_step, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, double, double, double,
                         double, bool, bool, bool, const OptionalTensor&, const OptionalTensor&);
  static const auto op = typed_operator<Signature>("cnnkernels::sgd_step_");
  op.call(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

}  // namespace cnnkernels::ops
