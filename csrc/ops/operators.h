// The operators as C++ functions that go through the dispatcher, for the Python
// entry points and for each other's derivatives. Schemas: library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace cnnkernels::ops {

using OptionalTensor = std::optional<at::Tensor>;
using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using TensorTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups);

// padding is "same" or "valid".
at::Tensor conv2d_padding(const at::Tensor& input, const at::Tensor& weight,
                          const OptionalTensor& bias, at::IntArrayRef stride,
                          std::string_view padding, at::IntArrayRef dilation, int64_t groups);

// relu(conv2d(...)), and the same with padding by name.
at::Tensor conv2d_relu(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups);
at::Tensor conv2d_relu_padding(const at::Tensor& input, const at::Tensor& weight,
                               const OptionalTensor& bias, at::IntArrayRef stride,
                               std::string_view padding, at::IntArrayRef dilation, int64_t groups);

// What differs between the two.
template <bool Relu>
struct Convolution {
  static constexpr const char* kName = Relu ? "conv2d_relu" : "conv2d";
  static constexpr auto kCall = Relu ? conv2d_relu : conv2d;
  static constexpr auto kCallPadding = Relu ? conv2d_relu_padding : conv2d_padding;
};

TensorTriple conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& weight, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             std::array<bool, 3> output_mask);

at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

TensorPair max_pool2d_with_indices(const at::Tensor& input, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, bool ceil_mode);

TensorPair max_pool2d_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode);

at::Tensor max_pool2d_backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                               c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool ceil_mode);

at::Tensor max_pool2d_gather(const at::Tensor& input, const at::Tensor& argmax,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

at::Tensor conv2d_relu_max_pool2d(const at::Tensor& input, const at::Tensor& weight,
                                  const OptionalTensor& bias, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                                  at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                                  bool pool_ceil_mode);

at::Tensor conv2d_relu_max_pool2d_padding(const at::Tensor& input, const at::Tensor& weight,
                                          const OptionalTensor& bias, at::IntArrayRef stride,
                                          std::string_view padding, at::IntArrayRef dilation,
                                          int64_t groups, at::IntArrayRef pool_kernel_size,
                                          at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                          at::IntArrayRef pool_dilation, bool pool_ceil_mode);

TensorPair conv2d_relu_max_pool2d_argmax(const at::Tensor& input, const at::Tensor& weight,
                                         const OptionalTensor& bias, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, at::IntArrayRef pool_kernel_size,
                                         at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                         at::IntArrayRef pool_dilation, bool pool_ceil_mode);

TensorTriple conv2d_relu_max_pool2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& argmax, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_kernel_size,
    at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
    bool pool_ceil_mode, std::array<bool, 3> output_mask);

// lr is a number, or a tensor of one element.
void gd_step_(at::TensorList params, at::TensorList grads, double lr);
void gd_step_(at::TensorList params, at::TensorList grads, const at::Tensor& lr);

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double weight_decay, double momentum, double lr, double dampening, bool nesterov,
               bool maximize, bool is_first_step, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf);
void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double weight_decay, double momentum, const at::Tensor& lr, double dampening,
               bool nesterov, bool maximize, bool is_first_step, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf);

}  // namespace cnnkernels::ops
