// The pooling operators on a device: arguments, memory and layouts are the same on all of them.
//
// A device is a struct of static functions:
//   empty(size, dtype, format, like)                at::empty on the device of a tensor
//   forward(problem, input, output, argmax)         tensors of the problem's layout; argmax may be
//                                                   undefined
//   backward(problem, grad_output, argmax, grad_input)
//   gather(problem, input, argmax, values)
//   indices(problem, argmax, indices)
//   not_native(problem)                             why no kernel takes it, or ""
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {

template <class Device>
class MaxPool2dOperators {
 public:
  static void add_to(torch::Library& library) {
    library.impl("max_pool2d", forward);
    library.impl("max_pool2d_with_indices", forward_with_indices);
    library.impl("max_pool2d_argmax", forward_argmax);
    library.impl("max_pool2d_backward", backward);
    library.impl("max_pool2d_gather", gather);
  }

 private:
  static constexpr const char* kOp = "max_pool2d";

  // A pooling of an N x C x H x W view of a tensor.
  struct Call {
    at::Tensor images;
    MaxPool2dProblem problem;
    at::MemoryFormat format;
    std::array<int64_t, 4> output_size;
  };

  static Call make_call(const char* op, const at::Tensor& input, const PoolArguments& arguments) {
    check_input_dimensions(op, input);
    Call call;
    call.images = input.dim() == 3 ? input.unsqueeze(0) : input;
    const Layout layout = pool_layout(call.images);
    call.problem = pool_problem(op, call.images.sizes(), dtype_of(input), layout, arguments);
    call.format = memory_format(layout);
    call.output_size = {call.problem.batch, call.problem.channels, call.problem.out_height,
                        call.problem.out_width};
    return call;
  }

  static at::Tensor unbatched(const at::Tensor& result, int64_t dimensions) {
    return dimensions == 3 ? result.squeeze(0) : result;
  }

  static at::ScalarType argmax_dtype(const MaxPool2dProblem& problem) {
    return problem.compact_argmax() ? at::kByte : at::kInt;
  }

  static ops::TensorPair pool(const at::Tensor& input, const PoolArguments& arguments,
                              bool with_argmax) {
    const Call call = make_call(kOp, input, arguments);
    const at::Tensor source = call.images.contiguous(call.format);
    const at::Tensor output =
        Device::empty(call.output_size, input.scalar_type(), call.format, input);
    at::Tensor argmax;
    if (with_argmax) {
      argmax = Device::empty(call.output_size, argmax_dtype(call.problem), call.format, input);
    }
    if (call.problem.batch > 0) {
      count(kernel_calls().max_pool2d);
      Device::forward(call.problem, source, output, argmax);
    }
    return {unbatched(output, input.dim()), with_argmax ? unbatched(argmax, input.dim()) : argmax};
  }

  static at::Tensor forward(const at::Tensor& input, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, bool ceil_mode) {
    const PoolArguments arguments =
        pool_arguments(kOp, kernel_size, stride, padding, dilation, ceil_mode);
    if (!not_native(input, arguments).empty()) {
      return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
    }
    return std::get<0>(pool(input, arguments, false));
  }

  static ops::TensorPair forward_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                        at::IntArrayRef dilation, bool ceil_mode) {
    const PoolArguments arguments =
        pool_arguments("max_pool2d_argmax", kernel_size, stride, padding, dilation, ceil_mode);
    const std::string reason = not_native(input, arguments);
    TORCH_CHECK(reason.empty(), "max_pool2d_argmax: no native kernel for this input: ", reason);
    return pool(input, arguments, true);
  }

  static ops::TensorPair forward_with_indices(const at::Tensor& input, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, bool ceil_mode) {
    const PoolArguments arguments =
        pool_arguments(kOp, kernel_size, stride, padding, dilation, ceil_mode);
    if (!not_native(input, arguments).empty()) {
      return at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
    }
    const auto [output, argmax] = pool(input, arguments, true);
    const Call call = make_call(kOp, input, arguments);
    const at::Tensor indices = Device::empty(call.output_size, at::kLong, call.format, input);
    if (call.problem.batch > 0) {
      Device::indices(call.problem, argmax, indices);
    }
    return {output, unbatched(indices, input.dim())};
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                             c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode) {
    const char* const op = "max_pool2d_backward";
    const PoolArguments arguments =
        pool_arguments(op, kernel_size, stride, padding, dilation, ceil_mode);
    const std::string reason = not_native(grad_output, Devices::cpu_and_cuda);
    TORCH_CHECK(reason.empty(), op, ": no native kernel for this grad_output: ", reason);
    check_input_dimensions(op, grad_output);
    at::DimVector size;
    for (const c10::SymInt& extent : input_size)
      size.push_back(extent.guard_int(__FILE__, __LINE__));
    TORCH_CHECK(static_cast<int64_t>(size.size()) == grad_output.dim(), op,
                ": input_size must have ", grad_output.dim(), " dimensions, but got ", size.size());
    if (size.size() == 3) size.insert(size.begin(), 1);
    const int64_t dimensions = grad_output.dim();
    const auto batched = [&](const at::Tensor& t) { return dimensions == 3 ? t.unsqueeze(0) : t; };
    const at::Tensor gradient = batched(grad_output);
    TORCH_CHECK(argmax.sizes() == grad_output.sizes(), op, ": argmax must have grad_output's size ",
                grad_output.sizes(), ", but got argmax of size ", argmax.sizes());
    // The argmax was made in the input's layout.
    const Layout layout = pool_layout(batched(argmax));
    const MaxPool2dProblem problem =
        pool_problem(op, size, dtype_of(grad_output), layout, arguments);
    const std::array<int64_t, 4> output_size = {problem.batch, problem.channels, problem.out_height,
                                                problem.out_width};
    TORCH_CHECK(gradient.sizes() == at::IntArrayRef(output_size), op,
                ": grad_output must have the output's size ", at::IntArrayRef(output_size),
                ", but got grad_output of size ", gradient.sizes());
    check_argmax(op, argmax, grad_output, problem);
    const std::string too_large = Device::not_native(problem);
    TORCH_CHECK(too_large.empty(), op, ": no native kernel for input_size ", at::IntArrayRef(size),
                ": ", too_large);
    const at::MemoryFormat format = memory_format(layout);
    const at::Tensor gradient_values = gradient.contiguous(format);
    const at::Tensor argmax_values = batched(argmax).contiguous(format);
    const at::Tensor grad_input =
        Device::empty(size, grad_output.scalar_type(), format, grad_output);
    if (problem.batch > 0) {
      count(kernel_calls().max_pool2d_backward);
      Device::backward(problem, gradient_values, argmax_values, grad_input);
    }
    return unbatched(grad_input, dimensions);
  }

  static at::Tensor gather(const at::Tensor& input, const at::Tensor& argmax,
                           at::IntArrayRef kernel_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
    const char* const op = "max_pool2d_gather";
    const PoolArguments arguments =
        pool_arguments(op, kernel_size, stride, padding, dilation, ceil_mode);
    const std::string reason = not_native(input, arguments);
    TORCH_CHECK(reason.empty(), op, ": no native kernel for this input: ", reason);
    Call call = make_call(op, input, arguments);
    const at::Tensor argmax_images = argmax.dim() == 3 ? argmax.unsqueeze(0) : argmax;
    call.problem.layout = pool_layout(argmax_images);
    call.format = memory_format(call.problem.layout);
    const at::Tensor values =
        Device::empty(call.output_size, input.scalar_type(), call.format, input);
    check_argmax(op, argmax_images, values, call.problem);
    const at::Tensor source = call.images.contiguous(call.format);
    const at::Tensor argmax_values = argmax_images.contiguous(call.format);
    if (call.problem.batch > 0) {
      count(kernel_calls().max_pool2d_gather);
      Device::gather(call.problem, source, argmax_values, values);
    }
    return unbatched(values, input.dim());
  }
};

}  // namespace cnnkernels
