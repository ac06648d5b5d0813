// The convolution operators on a device: arguments, memory and layouts are the same on all of them.
//
// A device is a struct of static functions:
//   empty(size, dtype, format, like)            at::empty on the device of a tensor
//   not_native(problem)                         why no kernel takes it, or ""
//   through_aten(problem, input)                whether the forward pass is torch's
//   gradients_through_aten(problem, input, wanted)
//                                               which of the gradients that are wanted are torch's
//   forward(problem, input, weight, bias, output)
//                                               tensors of the problem's layout; bias may be
//                                               undefined
//   backward(problem, grad_output, input, weight, grad_input, grad_weight, grad_bias)
//                                               the last three may be undefined; a gradient of the
//                                               weight has the problem's weight strides
#pragma once

#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {

template <class Device>
class Conv2dOperators {
 public:
  static void add_to(torch::Library& library) {
    library.impl("conv2d", forward<false>);
    library.impl("conv2d_relu", forward<true>);
    library.impl("conv2d_backward", backward);
  }

 private:
  static at::Tensor batched(const at::Tensor& tensor) {
    return tensor.dim() == 3 ? tensor.unsqueeze(0) : tensor;
  }

  // The format of an output. torch's ReLU returns the contiguous one where both are the same.
  static at::MemoryFormat output_format(const Conv2dProblem& problem) {
    const bool both = problem.batch == 0 || problem.out_channels == 1 ||
                      (problem.out_height == 1 && problem.out_width == 1);
    return problem.relu && both ? at::MemoryFormat::Contiguous : memory_format(problem.layout);
  }

  template <bool Relu>
  static at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
    const auto composed = [&] {
      return composed_conv2d(Relu, input, weight, bias, stride, padding, dilation, groups);
    };
    if (!conv2d_not_native(input, weight, bias, Devices::cpu_and_cuda).empty()) return composed();
    constexpr const char* op = ops::Convolution<Relu>::kName;
    check_input_dimensions(op, input);
    const ConvArguments arguments = conv_arguments(op, stride, padding, dilation, groups);
    const at::Tensor images = batched(input);
    Conv2dProblem problem = conv_problem(op, images, weight, bias, arguments);
    problem.relu = Relu;
    if (!Device::not_native(problem).empty() || Device::through_aten(problem, input)) {
      return composed();
    }
    const at::Tensor source = images.contiguous(memory_format(problem.layout));
    const at::Tensor output =
        Device::empty({problem.batch, problem.out_channels, problem.out_height, problem.out_width},
                      input.scalar_type(), output_format(problem), input);
    const at::Tensor bias_values = has_value(bias) ? bias->contiguous() : at::Tensor();
    if (problem.batch > 0) {
      count(Relu ? kernel_calls().conv2d_relu : kernel_calls().conv2d);
      Device::forward(problem, source, weight, bias_values, output);
    }
    return input.dim() == 3 ? output.squeeze(0) : output;
  }

  static ops::TensorTriple backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const at::Tensor& weight, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, std::array<bool, 3> output_mask) {
    using Mask = std::array<bool, 3>;
    constexpr const char* op = "conv2d_backward";
    const ConvArguments arguments = conv_arguments(op, stride, padding, dilation, groups);
    const at::Tensor images = batched(input);
    const at::Tensor gradient = batched(grad_output);
    const auto unbatched = [&](at::Tensor grad_input) {
      return grad_input.defined() && input.dim() == 3 ? grad_input.squeeze(0) : grad_input;
    };
    const auto through_aten = [&](Mask mask) {
      return at::convolution_backward(gradient, images, weight, at::IntArrayRef{weight.size(0)},
                                      arguments.stride, arguments.padding, arguments.dilation,
                                      false, {0, 0}, groups, mask);
    };
    const auto all_through_aten = [&]() -> ops::TensorTriple {
      auto [grad_input, grad_weight, grad_bias] = through_aten(output_mask);
      return {unbatched(grad_input), grad_weight, grad_bias};
    };
    TORCH_CHECK(grad_output.device() == input.device(), op,
                ": grad_output and input must be on the same device, but got grad_output on ",
                grad_output.device(), " and input on ", input.device());
    if (!conv2d_not_native(input, weight, std::nullopt, Devices::cpu_and_cuda).empty() ||
        !not_native(grad_output, Devices::cpu_and_cuda).empty()) {
      return all_through_aten();
    }
    check_input_dimensions(op, input);
    Conv2dProblem problem = conv_problem(op, images, weight, std::nullopt, arguments);
    const std::array<int64_t, 4> output_size = {problem.batch, problem.out_channels,
                                                problem.out_height, problem.out_width};
    TORCH_CHECK(gradient.sizes() == at::IntArrayRef(output_size), op,
                ": grad_output must have the size of the output, ", at::IntArrayRef(output_size),
                ", but got grad_output of size ", gradient.sizes());
    TORCH_CHECK(gradient.scalar_type() == input.scalar_type(), op,
                ": grad_output must have input's dtype ", input.scalar_type(), ", but got ",
                gradient.scalar_type());
    if (!Device::not_native(problem).empty()) return all_through_aten();
    const Mask torchs = Device::gradients_through_aten(problem, input, output_mask);
    if (torchs != Mask{} && torchs == output_mask) return all_through_aten();
    at::Tensor grad_input, grad_weight, grad_bias;
    if (torchs != Mask{}) std::tie(grad_input, grad_weight, grad_bias) = through_aten(torchs);
    const Mask own = {output_mask[0] && !torchs[0], output_mask[1] && !torchs[1],
                      output_mask[2] && !torchs[2]};

    const at::MemoryFormat format = memory_format(problem.layout);
    const at::Tensor weight_values = weight.contiguous(format);
    at::Tensor own_input, own_weight, own_bias;
    if (own[0]) {
      own_input = Device::empty(images.sizes(), input.scalar_type(), format, input);
    }
    if (own[1]) {
      own_weight = Device::empty(weight.sizes(), weight.scalar_type(), format, input);
    }
    if (own[2]) {
      own_bias = Device::empty({problem.out_channels}, weight.scalar_type(),
                               at::MemoryFormat::Contiguous, input);
    }
    if (problem.batch == 0) {
      if (own[1]) own_weight.zero_();
      if (own[2]) own_bias.zero_();
    } else {
      set_weight_strides(problem, own_weight.defined() ? own_weight : weight_values);
      const at::Tensor source = images.contiguous(format);
      const at::Tensor gradient_values = gradient.contiguous(format);
      count(kernel_calls().conv2d_backward);
      Device::backward(problem, gradient_values, source, weight_values, own_input, own_weight,
                       own_bias);
    }
    return {unbatched(own[0] ? own_input : grad_input), own[1] ? own_weight : grad_weight,
            own[2] ? own_bias : grad_bias};
  }
};

}  // namespace cnnkernels
