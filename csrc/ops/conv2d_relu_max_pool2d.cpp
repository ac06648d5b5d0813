// The fused block as one operator, and its backward through the winners. Its
// derivatives: autograd.cpp.
#include "ops/conv2d_relu_max_pool2d.h"

#include "ops/autocast.h"
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
  const std::string reason = conv2d_not_native(input, weight, bias, Devices::cpu_and_cuda);
  if (!reason.empty()) return reason;
  if ((pool.dilation[0] > 1 || pool.dilation[1] > 1) &&
      (pool.padding[0] > 0 || pool.padding[1] > 0)) {
    return "a dilated pooling window with padding";
  }
  if (pool.ceil_mode && (pool.dilation[0] > 1 || pool.dilation[1] > 1)) {
    return "a dilated pooling window with ceil_mode";
  }
  if (window_is_too_large(pool)) return "a window of more than 65536 elements";
  if (!input.is_cpu()) return "";  // sizes are the device's
  for (int axis = 0; axis < 2; ++axis) {
    if (arguments.conv.padding[axis] > 1024 || arguments.conv.dilation[axis] > 1024) {
      return "padding or dilation of more than 1024";  // the kernel writes out the border
    }
  }
  return "";
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

struct Cpu {
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format,
                          const at::Tensor&) {
    return empty_cpu(size, dtype, format);
  }
  static std::string not_native(const Conv2dReluMaxPool2dProblem&) { return ""; }
  static void forward(const Conv2dReluMaxPool2dProblem& problem, const BlockArguments&,
                      const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& output, const at::Tensor& argmax) {
    conv2d_relu_max_pool2d_forward(problem, active_isa(), torch_thread_pool(), read_data(input),
                                   read_data(weight), bias.defined() ? read_data(bias) : nullptr,
                                   output.mutable_data_ptr(),
                                   argmax.defined() ? argmax.mutable_data_ptr() : nullptr);
  }
  static ops::TensorTriple backward(Conv2dReluMaxPool2dProblem problem, const BlockArguments&,
                                    const at::Tensor& grad_output, const at::Tensor& input,
                                    const at::Tensor& weight, const at::Tensor& argmax,
                                    std::array<bool, 3> wanted) {
    const at::MemoryFormat format = memory_format(problem.conv.layout);
    const at::Tensor weight_values = weight.contiguous(format);
    at::Tensor grad_input, grad_weight, grad_bias;
    if (wanted[0]) grad_input = empty_cpu(input.sizes(), input.scalar_type(), format);
    if (wanted[1]) grad_weight = empty_cpu(weight.sizes(), weight.scalar_type(), format);
    if (wanted[2]) grad_bias = empty_cpu({problem.conv.out_channels}, weight.scalar_type());
    set_weight_strides(problem.conv, wanted[1] ? grad_weight : weight_values);
    const auto data = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
    };
    const ThreadPool pool = torch_thread_pool();
    const Conv2dReluMaxPool2dPlan plan =
        plan_conv2d_relu_max_pool2d(problem, active_isa(), pool.threads);
    const int64_t scratch_bytes = block_backward_scratch_bytes(problem, plan);
    at::Tensor scratch;
    if (scratch_bytes > 0) scratch = empty_cpu({scratch_bytes}, at::kByte);
    conv2d_relu_max_pool2d_backward(problem, plan, pool, read_data(grad_output), read_data(input),
                                    read_data(weight_values), read_data(argmax), data(grad_input),
                                    data(grad_weight), data(grad_bias), data(scratch));
    return {grad_input, grad_weight, grad_bias};
  }
};

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

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) { BlockOperators<Cpu>::add_to(m); }
TORCH_LIBRARY_IMPL(cnnkernels, CompositeImplicitAutograd, m) {
  m.impl("conv2d_relu_max_pool2d.padding", same_or_valid);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCPU, m) { m.impl("conv2d_relu_max_pool2d", autocast); }
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCUDA, m) { m.impl("conv2d_relu_max_pool2d", autocast); }

}  // namespace cnnkernels
