// The fused block as one operator, and its backward through the winners. Its
// derivatives: autograd.cpp.
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/autocast.h"
#include "ops/dispatch.h"
#include "ops/operators.h"
#include "ops/result_memory.h"

namespace cnnkernels {
namespace ops {

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

}  // namespace ops

constexpr PoolNames kPoolNames = {"pool_kernel_size", "pool_stride", "pool_padding",
                                  "pool_dilation"};

BlockArguments block_arguments(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups,
                               at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                               at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                               bool pool_ceil_mode) {
  return {conv_arguments(op, stride, padding, dilation, groups),
          pool_arguments(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                         pool_ceil_mode, kPoolNames)};
}

at::Tensor composed_block(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const BlockArguments& arguments) {
  const at::Tensor convolved =
      ops::conv2d_relu(input, weight, bias, arguments.conv.stride, arguments.conv.padding,
                       arguments.conv.dilation, arguments.conv.groups);
  return ops::max_pool2d(convolved, arguments.pool.kernel_size, arguments.pool.stride,
                         arguments.pool.padding, arguments.pool.dilation, arguments.pool.ceil_mode);
}

std::string block_not_native(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias,
                             const BlockArguments& arguments) {
  const PoolArguments& pool = arguments.pool;
  const std::string reason = conv2d_not_native(input, weight, bias, Devices::cpu);
  if (!reason.empty()) return reason;
  if ((pool.dilation[0] > 1 || pool.dilation[1] > 1) &&
      (pool.padding[0] > 0 || pool.padding[1] > 0)) {
    return "a dilated pooling window with padding";
  }
  if (pool.ceil_mode && (pool.dilation[0] > 1 || pool.dilation[1] > 1)) {
    return "a dilated pooling window with ceil_mode";
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (arguments.conv.padding[axis] > 1024 || arguments.conv.dilation[axis] > 1024) {
      return "padding or dilation of more than 1024";  // the kernel writes out the border
    }
  }
  PoolArguments undilated = pool;
  undilated.dilation = {1, 1};
  return not_native(input, undilated);
}

Conv2dReluMaxPool2dProblem block_problem(const char* op, const at::Tensor& images,
                                         const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias,
                                         const BlockArguments& arguments) {
  Conv2dReluMaxPool2dProblem problem;
  problem.conv = conv_problem(op, images, weight, bias, arguments.conv);
  // As torch's ReLU, which returns the contiguous format where both are the same.
  if (problem.conv.out_channels == 1 ||
      (problem.conv.out_height == 1 && problem.conv.out_width == 1)) {
    problem.conv.layout = Layout::nchw;
  }
  const std::array<int64_t, 4> conv_size = {problem.conv.batch, problem.conv.out_channels,
                                            problem.conv.out_height, problem.conv.out_width};
  problem.pool =
      pool_problem(op, conv_size, problem.conv.dtype, problem.conv.layout, arguments.pool);
  return problem;
}

namespace {

constexpr const char* kOp = "conv2d_relu_max_pool2d";

at::Tensor batched(const at::Tensor& tensor, int64_t dimensions) {
  return tensor.defined() && dimensions == 3 ? tensor.unsqueeze(0) : tensor;
}

at::Tensor unbatched(const at::Tensor& tensor, int64_t dimensions) {
  return tensor.defined() && dimensions == 3 ? tensor.squeeze(0) : tensor;
}

std::array<int64_t, 4> output_size(const MaxPool2dProblem& pool) {
  return {pool.batch, pool.channels, pool.out_height, pool.out_width};
}

ops::TensorPair run(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, const BlockArguments& arguments,
                    bool with_argmax) {
  check_input_dimensions(kOp, input);
  const at::Tensor images = batched(input, input.dim());
  const Conv2dReluMaxPool2dProblem problem = block_problem(kOp, images, weight, bias, arguments);
  const at::MemoryFormat format = memory_format(problem.conv.layout);
  const at::Tensor source = images.contiguous(format);
  const at::Tensor bias_values = has_value(bias) ? bias->contiguous() : at::Tensor();
  const at::Tensor output = empty_cpu(output_size(problem.pool), input.scalar_type(), format);
  at::Tensor argmax;
  if (with_argmax) {
    argmax = empty_cpu(output_size(problem.pool),
                       problem.pool.compact_argmax() ? at::kByte : at::kInt, format);
  }
  if (problem.conv.batch > 0) {
    count(kernel_calls().conv2d_relu_max_pool2d);
    conv2d_relu_max_pool2d_forward(
        problem, active_isa(), torch_thread_pool(), read_data(source), read_data(weight),
        bias_values.defined() ? read_data(bias_values) : nullptr, output.mutable_data_ptr(),
        with_argmax ? argmax.mutable_data_ptr() : nullptr);
  }
  return {unbatched(output, input.dim()), unbatched(argmax, input.dim())};
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
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
  return std::get<0>(run(input, weight, bias, arguments, false));
}

ops::TensorPair forward_argmax(const at::Tensor& input, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                               at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                               at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                               bool pool_ceil_mode) {
  const char* const op = "conv2d_relu_max_pool2d_argmax";
  const BlockArguments arguments =
      block_arguments(op, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
                      pool_padding, pool_dilation, pool_ceil_mode);
  const std::string reason = block_not_native(input, weight, bias, arguments);
  TORCH_CHECK(reason.empty(), op, ": no native kernel for these arguments: ", reason);
  return run(input, weight, bias, arguments, true);
}

ops::TensorTriple backward(const at::Tensor& grad_output, const at::Tensor& input,
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
  std::string reason = block_not_native(input, weight, std::nullopt, arguments);
  if (reason.empty()) reason = not_native(grad_output);
  TORCH_CHECK(reason.empty(), op, ": no native kernel for these arguments: ", reason);
  check_input_dimensions(op, input);
  const int64_t dimensions = input.dim();
  const at::Tensor images = batched(input, dimensions);
  Conv2dReluMaxPool2dProblem problem = block_problem(op, images, weight, std::nullopt, arguments);
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
  const at::Tensor weight_values = weight.contiguous(format);
  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = empty_cpu(images.sizes(), input.scalar_type(), format);
  if (output_mask[1]) grad_weight = empty_cpu(weight.sizes(), weight.scalar_type(), format);
  if (output_mask[2]) grad_bias = empty_cpu({problem.conv.out_channels}, weight.scalar_type());
  if (problem.conv.batch == 0) {
    if (output_mask[1]) grad_weight.zero_();
    if (output_mask[2]) grad_bias.zero_();
    return {unbatched(grad_input, dimensions), grad_weight, grad_bias};
  }
  set_weight_strides(problem.conv, grad_weight.defined() ? grad_weight : weight_values);
  const at::Tensor source = images.contiguous(format);
  const at::Tensor gradient_values = gradient.contiguous(format);
  const at::Tensor argmax_values = winners.contiguous(format);
  const auto data = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  const ThreadPool pool = torch_thread_pool();
  const Conv2dReluMaxPool2dPlan plan =
      plan_conv2d_relu_max_pool2d(problem, active_isa(), pool.threads);
  const int64_t scratch_bytes = block_backward_scratch_bytes(problem, plan);
  at::Tensor scratch;
  if (scratch_bytes > 0) scratch = empty_cpu({scratch_bytes}, at::kByte);
  count(kernel_calls().conv2d_relu_max_pool2d_backward);
  conv2d_relu_max_pool2d_backward(problem, plan, pool, read_data(gradient_values),
                                  read_data(source), read_data(weight_values),
                                  read_data(argmax_values), data(grad_input), data(grad_weight),
                                  data(grad_bias), data(scratch));
  return {unbatched(grad_input, dimensions), grad_weight, grad_bias};
}

at::Tensor same_or_valid(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                         std::string_view padding, at::IntArrayRef dilation, int64_t groups,
                         at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                         at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                         bool pool_ceil_mode) {
  const PaddedInput padded = pad_input(kOp, input, weight, stride, padding, dilation);
  return ops::conv2d_relu_max_pool2d(padded.input, weight, bias, stride, padded.padding, dilation,
                                     groups, pool_kernel_size, pool_stride, pool_padding,
                                     pool_dilation, pool_ceil_mode);
}

at::Tensor autocast(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                    at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                    bool pool_ceil_mode) {
  const AutocastToLower lower(input.device().type());
  return ops::conv2d_relu_max_pool2d(lower(input), lower(weight), lower(bias), stride, padding,
                                     dilation, groups, pool_kernel_size, pool_stride, pool_padding,
                                     pool_dilation, pool_ceil_mode);
}

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) {
  m.impl("conv2d_relu_max_pool2d", forward);
  m.impl("conv2d_relu_max_pool2d_argmax", forward_argmax);
  m.impl("conv2d_relu_max_pool2d_backward", backward);
}
TORCH_LIBRARY_IMPL(cnnkernels, CompositeImplicitAutograd, m) {
  m.impl("conv2d_relu_max_pool2d.padding", same_or_valid);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCPU, m) { m.impl("conv2d_relu_max_pool2d", autocast); }
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCUDA, m) { m.impl("conv2d_relu_max_pool2d", autocast); }

}  // namespace cnnkernels
