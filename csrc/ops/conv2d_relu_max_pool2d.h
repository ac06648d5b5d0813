// The fused block on a device: arguments, memory and layouts are the same on all of them.
//
// A device is a struct of static functions:
//   empty(size, dtype, format, like)       at::empty on the device of a tensor
//   not_native(problem)                    why no kernel takes it, or ""
//   forward(problem, arguments, input, weight, bias, output, argmax)
//                                          tensors of the problem's layout; bias and argmax may be
//                                          undefined
//   backward(problem, arguments, grad_output, input, weight, argmax, wanted)
//                                          the three gradients, of a batch that is not empty
#pragma once

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {

template <class Device>
class BlockOperators {
 public:
  static void add_to(torch::Library& library) {
    library.impl("conv2d_relu_max_pool2d", forward);
    library.impl("conv2d_relu_max_pool2d_argmax", forward_argmax);
    library.impl("conv2d_relu_max_pool2d_backward", backward);
  }

 private:
  static constexpr const char* kOp = "conv2d_relu_max_pool2d";

  static at::Tensor batched(const at::Tensor& tensor, int64_t dimensions) {
    return tensor.defined() && dimensions == 3 ? tensor.unsqueeze(0) : tensor;
  }

  static at::Tensor unbatched(const at::Tensor& tensor, int64_t dimensions) {
    return tensor.defined() && dimensions == 3 ? tensor.squeeze(0) : tensor;
  }

  static std::array<int64_t, 4> output_size(const MaxPool2dProblem& pool) {
    return {pool.batch, pool.channels, pool.out_height, pool.out_width};
  }

  static Conv2dReluMaxPool2dProblem make_problem(const char* op, const at::Tensor& input,
                                                 const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias,
                                                 const BlockArguments& arguments) {
    check_input_dimensions(op, input);
    return block_problem(op, batched(input, input.dim()), weight, bias, arguments);
  }

  // Raises where no kernel takes a call that torch has no operator for.
  static void check_native(const char* op, const std::string& reason) {
    TORCH_CHECK(reason.empty(), op, ": no native kernel for these arguments: ", reason);
  }

  static ops::TensorPair run(const Conv2dReluMaxPool2dProblem& problem, const at::Tensor& input,
                             const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const BlockArguments& arguments, bool with_argmax) {
    const at::Tensor images = batched(input, input.dim());
    const at::MemoryFormat format = memory_format(problem.conv.layout);
    const at::Tensor source = images.contiguous(format);
    const at::Tensor bias_values = has_value(bias) ? bias->contiguous() : at::Tensor();
    const at::Tensor output =
        Device::empty(output_size(problem.pool), input.scalar_type(), format, input);
    at::Tensor argmax;
    if (with_argmax) {
      argmax = Device::empty(output_size(problem.pool),
                             problem.pool.compact_argmax() ? at::kByte : at::kInt, format, input);
    }
    if (problem.conv.batch > 0) {
      count(kernel_calls().conv2d_relu_max_pool2d);
      Device::forward(problem, arguments, source, weight, bias_values, output, argmax);
    }
    return {unbatched(output, input.dim()), unbatched(argmax, input.dim())};
  }

  static at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                            at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                            at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                            bool pool_ceil_mode) {
    const BlockArguments arguments =
        block_arguments(kOp, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
                        pool_padding, pool_dilation, pool_ceil_mode);
    if (!block_not_native(input, weight, bias, arguments).empty()) {
      return composed_block(input, weight, bias, arguments);
    }
    const auto problem = make_problem(kOp, input, weight, bias, arguments);
    if (!Device::not_native(problem).empty()) {
      return composed_block(input, weight, bias, arguments);
    }
    return std::get<0>(run(problem, input, weight, bias, arguments, false));
  }

  static ops::TensorPair forward_argmax(const at::Tensor& input, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias,
                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                        at::IntArrayRef dilation, int64_t groups,
                                        at::IntArrayRef pool_kernel_size,
                                        at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                        at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
    const char* const op = "conv2d_relu_max_pool2d_argmax";
    const BlockArguments arguments =
        block_arguments(op, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
                        pool_padding, pool_dilation, pool_ceil_mode);
    check_native(op, block_not_native(input, weight, bias, arguments));
    const auto problem = make_problem(kOp, input, weight, bias, arguments);
    check_native(op, Device::not_native(problem));
    return run(problem, input, weight, bias, arguments, true);
  }

  static ops::TensorTriple backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const at::Tensor& weight, const at::Tensor& argmax,
                                    at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation, int64_t groups,
                                    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                                    at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                                    bool pool_ceil_mode, std::array<bool, 3> output_mask) {
    const char* const op = "conv2d_relu_max_pool2d_backward";
    const BlockArguments arguments =
        block_arguments(op, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
                        pool_padding, pool_dilation, pool_ceil_mode);
    check_native(op, block_not_native(input, weight, std::nullopt, arguments));
    check_native(op, not_native(grad_output, Devices::cpu_and_cuda));
    const auto problem = make_problem(op, input, weight, std::nullopt, arguments);
    check_native(op, Device::not_native(problem));
    const int64_t dimensions = input.dim();
    const at::Tensor images = batched(input, dimensions);
    const std::array<int64_t, 4> size = output_size(problem.pool);
    const at::Tensor gradient = batched(grad_output, dimensions);
    const at::Tensor winners = batched(argmax, dimensions);
    TORCH_CHECK(gradient.sizes() == at::IntArrayRef(size), op,
                ": grad_output must have the size of the output, ", at::IntArrayRef(size),
                ", but got grad_output of size ", gradient.sizes());
    TORCH_CHECK(gradient.scalar_type() == input.scalar_type(), op,
                ": grad_output must have input's dtype ", input.scalar_type(), ", but got ",
                gradient.scalar_type());
    check_argmax(op, winners, gradient, problem.pool);

    const at::MemoryFormat format = memory_format(problem.conv.layout);
    if (problem.conv.batch == 0) {
      at::Tensor grad_input, grad_weight, grad_bias;
      if (output_mask[0]) {
        grad_input = Device::empty(images.sizes(), input.scalar_type(), format, input);
      }
      if (output_mask[1]) grad_weight = at::zeros_like(weight, weight.options(), format);
      if (output_mask[2]) grad_bias = at::zeros({problem.conv.out_channels}, weight.options());
      return {unbatched(grad_input, dimensions), grad_weight, grad_bias};
    }
    count(kernel_calls().conv2d_relu_max_pool2d_backward);
    auto [grad_input, grad_weight, grad_bias] =
        Device::backward(problem, arguments, gradient.contiguous(format), images.contiguous(format),
                         weight, winners.contiguous(format), output_mask);
    return {unbatched(grad_input, dimensions), grad_weight, grad_bias};
  }
};

}  // namespace cnnkernels
