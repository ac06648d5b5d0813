// conv2d, conv2d_relu and their backward: native where the kernels cover the call,
// ATen where they do not. Their derivatives: autograd.cpp.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include <limits>

#include "ops/arguments.h"
#include "ops/autocast.h"
#include "ops/dispatch.h"
#include "ops/operators.h"
#include "ops/result_memory.h"

namespace cnnkernels {
namespace ops {

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

}  // namespace ops

std::string conv2d_not_native(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.device() == input.device(),
              "conv2d: input and weight must be on the same device, but got input on ",
              input.device(), " and weight on ", weight.device());
  TORCH_CHECK(!has_value(bias) || bias->device() == input.device(),
              "conv2d: input and bias must be on the same device, but got input on ",
              input.device(), " and bias on ", has_value(bias) ? bias->device() : input.device());
  std::string reason = not_native(input);
  if (reason.empty() && has_value(bias)) reason = not_native(*bias);
  if (reason.empty()) reason = not_native(weight);
  if (!reason.empty() || input.dim() < 3) return reason;
  for (int64_t axis = input.dim() - 3; axis < input.dim(); ++axis) {
    // Symbolic sizes stay symbolic, or an export would fix a dynamic one.
    if (TORCH_GUARD_OR_FALSE(input.sym_size(axis).sym_eq(0))) return "input has no elements";
  }
  return "";
}

at::Tensor composed_conv2d(bool relu, const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const at::Tensor convolved = at::conv2d(input, weight, bias, stride, padding, dilation, groups);
  return relu ? at::relu(convolved) : convolved;
}

PaddedInput pad_input(const char* op, const at::Tensor& input, const at::Tensor& weight,
                      at::IntArrayRef stride, std::string_view padding, at::IntArrayRef dilation) {
  TORCH_CHECK(padding == "same" || padding == "valid", op,
              ": padding must be an integer, a pair, 'same' or 'valid', but got padding='",
              std::string(padding), "'");
  if (padding == "valid") return {input, {0, 0}};
  const Pair strides = expand_pair(op, "stride", stride);
  const Pair dilations = expand_pair(op, "dilation", dilation);
  TORCH_CHECK(strides[0] == 1 && strides[1] == 1, op,
              ": padding='same' needs stride=1, but got stride=(", strides[0], ", ", strides[1],
              ")");
  TORCH_CHECK(weight.dim() == 4, op, ": weight must be 4-D, but got weight of size ",
              weight.sizes());
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(dilations[axis] > 0 && dilations[axis] <= std::numeric_limits<int32_t>::max(), op,
                ": dilation must be positive and fit in 32 bits for padding='same', but got ",
                dilations[axis]);
  }
  // As torch: an odd total goes below and to the right.
  const int64_t total_h = dilations[0] * (weight.size(2) - 1);
  const int64_t total_w = dilations[1] * (weight.size(3) - 1);
  const Pair both = {total_h / 2, total_w / 2};
  if (total_h % 2 == 0 && total_w % 2 == 0) return {input, both};
  return {at::constant_pad_nd(input, {0, total_w % 2, 0, total_h % 2}, 0), both};
}

namespace {

at::Tensor batched(const at::Tensor& input) {
  return input.dim() == 3 ? input.unsqueeze(0) : input;
}

// The format of an output. torch's ReLU returns the contiguous one where both are the same.
at::MemoryFormat output_format(const Conv2dProblem& problem) {
  const bool both = problem.batch == 0 || problem.out_channels == 1 ||
                    (problem.out_height == 1 && problem.out_width == 1);
  return problem.relu && both ? at::MemoryFormat::Contiguous : memory_format(problem.layout);
}

template <bool Relu>
at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (!conv2d_not_native(input, weight, bias).empty()) {
    return composed_conv2d(Relu, input, weight, bias, stride, padding, dilation, groups);
  }
  constexpr const char* op = ops::Convolution<Relu>::kName;
  check_input_dimensions(op, input);
  const ConvArguments arguments = conv_arguments(op, stride, padding, dilation, groups);
  const at::Tensor images = batched(input);
  Conv2dProblem problem = conv_problem(op, images, weight, bias, arguments);
  problem.relu = Relu;
  if (mostly_border(problem)) {
    return composed_conv2d(Relu, input, weight, bias, stride, padding, dilation, groups);
  }
  const at::Tensor source = images.contiguous(memory_format(problem.layout));
  const at::Tensor output =
      empty_cpu({problem.batch, problem.out_channels, problem.out_height, problem.out_width},
                input.scalar_type(), output_format(problem));
  const at::Tensor bias_values = has_value(bias) ? bias->contiguous() : at::Tensor();
  if (problem.batch > 0) {
    count(Relu ? kernel_calls().conv2d_relu : kernel_calls().conv2d);
    conv2d_forward(problem, active_isa(), torch_thread_pool(), read_data(source), read_data(weight),
                   bias_values.defined() ? read_data(bias_values) : nullptr,
                   output.mutable_data_ptr());
  }
  return input.dim() == 3 ? output.squeeze(0) : output;
}

ops::TensorTriple backward(const at::Tensor& grad_output, const at::Tensor& input,
                           const at::Tensor& weight, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           std::array<bool, 3> output_mask) {
  const ConvArguments arguments =
      conv_arguments("conv2d_backward", stride, padding, dilation, groups);
  const at::Tensor images = batched(input);
  const at::Tensor gradient = grad_output.dim() == 3 ? grad_output.unsqueeze(0) : grad_output;
  const auto unbatched = [&](at::Tensor grad_input) {
    return grad_input.defined() && input.dim() == 3 ? grad_input.squeeze(0) : grad_input;
  };
  const auto through_aten = [&]() -> ops::TensorTriple {
    auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
        gradient, images, weight, at::IntArrayRef{weight.size(0)}, arguments.stride,
        arguments.padding, arguments.dilation, false, {0, 0}, groups, output_mask);
    return {unbatched(grad_input), grad_weight, grad_bias};
  };
  TORCH_CHECK(grad_output.device() == input.device(),
              "conv2d_backward: grad_output and input must be on the same device, but got "
              "grad_output on ",
              grad_output.device(), " and input on ", input.device());
  if (!conv2d_not_native(input, weight, std::nullopt).empty() || !not_native(grad_output).empty()) {
    return through_aten();
  }
  check_input_dimensions("conv2d_backward", input);
  Conv2dProblem problem = conv_problem("conv2d_backward", images, weight, std::nullopt, arguments);
  if (mostly_border(problem)) return through_aten();
  const std::array<int64_t, 4> output_size = {problem.batch, problem.out_channels,
                                              problem.out_height, problem.out_width};
  TORCH_CHECK(gradient.sizes() == at::IntArrayRef(output_size),
              "conv2d_backward: grad_output must have the size of the output, ",
              at::IntArrayRef(output_size), ", but got grad_output of size ", gradient.sizes());
  TORCH_CHECK(gradient.scalar_type() == input.scalar_type(),
              "conv2d_backward: grad_output must have input's dtype ", input.scalar_type(),
              ", but got ", gradient.scalar_type());
  const at::MemoryFormat format = memory_format(problem.layout);
  const at::Tensor weight_values = weight.contiguous(format);

  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = empty_cpu(images.sizes(), input.scalar_type(), format);
  if (output_mask[1]) {
    grad_weight = empty_cpu(weight.sizes(), weight.scalar_type(), format);
  }
  if (output_mask[2]) grad_bias = empty_cpu({problem.out_channels}, weight.scalar_type());
  if (problem.batch == 0) {
    if (output_mask[1]) grad_weight.zero_();
    if (output_mask[2]) grad_bias.zero_();
    return {unbatched(grad_input), grad_weight, grad_bias};
  }
  set_weight_strides(problem, grad_weight.defined() ? grad_weight : weight_values);
  const at::Tensor source = images.contiguous(format);
  const at::Tensor gradient_values = gradient.contiguous(format);
  const auto data = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  count(kernel_calls().conv2d_backward);
  conv2d_backward(problem, active_isa(), torch_thread_pool(), read_data(gradient_values),
                  read_data(source), read_data(weight_values), data(grad_input), data(grad_weight),
                  data(grad_bias));
  return {unbatched(grad_input), grad_weight, grad_bias};
}

template <bool Relu>
at::Tensor same_or_valid(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                         std::string_view padding, at::IntArrayRef dilation, int64_t groups) {
  using Operator = ops::Convolution<Relu>;
  const PaddedInput padded = pad_input(Operator::kName, input, weight, stride, padding, dilation);
  return Operator::kCall(padded.input, weight, bias, stride, padded.padding, dilation, groups);
}

template <bool Relu>
at::Tensor autocast(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const AutocastToLower lower(input.device().type());
  return ops::Convolution<Relu>::kCall(lower(input), lower(weight), lower(bias), stride, padding,
                                       dilation, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) {
  m.impl("conv2d", forward<false>);
  m.impl("conv2d_relu", forward<true>);
  m.impl("conv2d_backward", backward);
}
TORCH_LIBRARY_IMPL(cnnkernels, CompositeImplicitAutograd, m) {
  m.impl("conv2d.padding", same_or_valid<false>);
  m.impl("conv2d_relu.padding", same_or_valid<true>);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCPU, m) {
  m.impl("conv2d", autocast<false>);
  m.impl("conv2d_relu", autocast<true>);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCUDA, m) {
  m.impl("conv2d", autocast<false>);
  m.impl("conv2d_relu", autocast<true>);
}

}  // namespace cnnkernels
