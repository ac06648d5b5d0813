// max_pool2d, its argmax in one byte, and the operators that follow the argmax.
// Their derivatives: autograd.cpp.
#include <ATen/core/DimVector.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"
#include "ops/result_memory.h"

namespace cnnkernels {
namespace ops {

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

}  // namespace ops

void check_argmax(const char* op, const at::Tensor& argmax, const at::Tensor& output,
                  const MaxPool2dProblem& problem) {
  TORCH_CHECK(argmax.device().is_cpu() &&
                  argmax.scalar_type() == (problem.compact_argmax() ? at::kByte : at::kInt),
              op, ": argmax must be ", problem.compact_argmax() ? "uint8" : "int32",
              " on the CPU for windows of ", problem.window(), " elements, but got ",
              argmax.scalar_type(), " on ", argmax.device());
  TORCH_CHECK(argmax.sizes() == output.sizes(), op, ": argmax must have the output's size ",
              output.sizes(), ", but got argmax of size ", argmax.sizes());
}

namespace {

constexpr const char* kOp = "max_pool2d";

// A pooling of an N x C x H x W view of a tensor.
struct Call {
  at::Tensor images;
  MaxPool2dProblem problem;
  at::MemoryFormat format;
  std::array<int64_t, 4> output_size;
};

Call make_call(const char* op, const at::Tensor& input, const PoolArguments& arguments) {
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

at::Tensor unbatched(const at::Tensor& result, int64_t dimensions) {
  return dimensions == 3 ? result.squeeze(0) : result;
}

at::ScalarType argmax_dtype(const MaxPool2dProblem& problem) {
  return problem.compact_argmax() ? at::kByte : at::kInt;
}

ops::TensorPair pool(const at::Tensor& input, const PoolArguments& arguments, bool with_argmax) {
  const Call call = make_call(kOp, input, arguments);
  const at::Tensor source = call.images.contiguous(call.format);
  const at::Tensor output = empty_cpu(call.output_size, input.scalar_type(), call.format);
  at::Tensor argmax;
  if (with_argmax) {
    argmax = empty_cpu(call.output_size, argmax_dtype(call.problem), call.format);
  }
  if (call.problem.batch > 0) {
    count(kernel_calls().max_pool2d);
    max_pool2d_forward(call.problem, active_isa(), torch_thread_pool(), read_data(source),
                       output.mutable_data_ptr(),
                       with_argmax ? argmax.mutable_data_ptr() : nullptr);
  }
  return {unbatched(output, input.dim()), with_argmax ? unbatched(argmax, input.dim()) : argmax};
}

at::Tensor forward(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const PoolArguments arguments =
      pool_arguments(kOp, kernel_size, stride, padding, dilation, ceil_mode);
  if (!not_native(input, arguments).empty()) {
    return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return std::get<0>(pool(input, arguments, false));
}

ops::TensorPair forward_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool ceil_mode) {
  const PoolArguments arguments =
      pool_arguments("max_pool2d_argmax", kernel_size, stride, padding, dilation, ceil_mode);
  const std::string reason = not_native(input, arguments);
  TORCH_CHECK(reason.empty(), "max_pool2d_argmax: no native kernel for this input: ", reason);
  return pool(input, arguments, true);
}

ops::TensorPair forward_with_indices(const at::Tensor& input, at::IntArrayRef kernel_size,
                                     at::IntArrayRef stride, at::IntArrayRef padding,
                                     at::IntArrayRef dilation, bool ceil_mode) {
  const PoolArguments arguments =
      pool_arguments(kOp, kernel_size, stride, padding, dilation, ceil_mode);
  if (!not_native(input, arguments).empty()) {
    return at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  const auto [output, argmax] = pool(input, arguments, true);
  const Call call = make_call(kOp, input, arguments);
  const at::Tensor indices = empty_cpu(call.output_size, at::kLong, call.format);
  if (call.problem.batch > 0) {
    max_pool2d_indices(call.problem, torch_thread_pool(), read_data(argmax),
                       static_cast<int64_t*>(indices.mutable_data_ptr()));
  }
  return {output, unbatched(indices, input.dim())};
}

at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                    c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                    bool ceil_mode) {
  const char* const op = "max_pool2d_backward";
  const PoolArguments arguments =
      pool_arguments(op, kernel_size, stride, padding, dilation, ceil_mode);
  const std::string reason = not_native(grad_output);
  TORCH_CHECK(reason.empty(), op, ": no native kernel for this grad_output: ", reason);
  check_input_dimensions(op, grad_output);
  at::DimVector size;
  for (const c10::SymInt& extent : input_size) size.push_back(extent.guard_int(__FILE__, __LINE__));
  TORCH_CHECK(static_cast<int64_t>(size.size()) == grad_output.dim(), op, ": input_size must have ",
              grad_output.dim(), " dimensions, but got ", size.size());
  if (size.size() == 3) size.insert(size.begin(), 1);
  const int64_t dimensions = grad_output.dim();
  const auto batched = [&](const at::Tensor& t) { return dimensions == 3 ? t.unsqueeze(0) : t; };
  const at::Tensor gradient = batched(grad_output);
  TORCH_CHECK(argmax.sizes() == grad_output.sizes(), op, ": argmax must have grad_output's size ",
              grad_output.sizes(), ", but got argmax of size ", argmax.sizes());
  // The argmax was made in the input's layout.
  const Layout layout = pool_layout(batched(argmax));
  const MaxPool2dProblem problem = pool_problem(op, size, dtype_of(grad_output), layout, arguments);
  const std::array<int64_t, 4> output_size = {problem.batch, problem.channels, problem.out_height,
                                              problem.out_width};
  TORCH_CHECK(gradient.sizes() == at::IntArrayRef(output_size), op,
              ": grad_output must have the output's size ", at::IntArrayRef(output_size),
              ", but got grad_output of size ", gradient.sizes());
  check_argmax(op, argmax, grad_output, problem);
  const at::MemoryFormat format = memory_format(layout);
  const at::Tensor gradient_values = gradient.contiguous(format);
  const at::Tensor argmax_values = batched(argmax).contiguous(format);
  const at::Tensor grad_input = empty_cpu(size, grad_output.scalar_type(), format);
  if (problem.batch > 0) {
    count(kernel_calls().max_pool2d_backward);
    cnnkernels::max_pool2d_backward(problem, active_isa(), torch_thread_pool(),
                                    read_data(gradient_values), read_data(argmax_values),
                                    grad_input.mutable_data_ptr());
  }
  return unbatched(grad_input, dimensions);
}

at::Tensor gather(const at::Tensor& input, const at::Tensor& argmax, at::IntArrayRef kernel_size,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  bool ceil_mode) {
  const char* const op = "max_pool2d_gather";
  const PoolArguments arguments =
      pool_arguments(op, kernel_size, stride, padding, dilation, ceil_mode);
  const std::string reason = not_native(input, arguments);
  TORCH_CHECK(reason.empty(), op, ": no native kernel for this input: ", reason);
  Call call = make_call(op, input, arguments);
  const at::Tensor argmax_images = argmax.dim() == 3 ? argmax.unsqueeze(0) : argmax;
  call.problem.layout = pool_layout(argmax_images);
  call.format = memory_format(call.problem.layout);
  const at::Tensor values = empty_cpu(call.output_size, input.scalar_type(), call.format);
  check_argmax(op, argmax_images, values, call.problem);
  const at::Tensor source = call.images.contiguous(call.format);
  const at::Tensor argmax_values = argmax_images.contiguous(call.format);
  if (call.problem.batch > 0) {
    count(kernel_calls().max_pool2d_gather);
    cnnkernels::max_pool2d_gather(call.problem, torch_thread_pool(), read_data(source),
                                  read_data(argmax_values), values.mutable_data_ptr());
  }
  return unbatched(values, input.dim());
}

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d", forward);
  m.impl("max_pool2d_with_indices", forward_with_indices);
  m.impl("max_pool2d_argmax", forward_argmax);
  m.impl("max_pool2d_backward", backward);
  m.impl("max_pool2d_gather", gather);
}

}  // namespace cnnkernels
