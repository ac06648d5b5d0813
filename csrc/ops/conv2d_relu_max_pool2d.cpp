// The fused block as one operator, and its backward through the winners. Its
// derivatives: autograd.cpp.
#include "ops/conv2d_relu_max_pool2d.h"

#include "ops/autocast.h"
#include "ops/result_memory.h"

namespace cnnkernels {
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
