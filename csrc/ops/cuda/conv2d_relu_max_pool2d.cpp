// The fused block on CUDA: one kernel where its blocks pool, else a convolution with its ReLU and a
// pooling. Either way the winners are saved, in a byte each, and not the convolution's result.
#include "ops/conv2d_relu_max_pool2d.h"

#include "kernels/cuda/max_pool2d.h"
#include "ops/cuda/conv2d.h"

namespace cnnkernels {
namespace {

struct Cuda : cuda::Allocation {
  // A convolution that no kernel takes is torch's, and its pooling ours.
  static std::string not_native(const Conv2dReluMaxPool2dProblem& problem) {
    return cuda::max_pool2d_not_native(problem.pool);
  }
  static void forward(const Conv2dReluMaxPool2dProblem& problem, const BlockArguments& arguments,
                      const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& output, const at::Tensor& argmax) {
    const cuda::DeviceScope scope(input);
    const cuda::DeviceLimits& limits = cuda::limits_of(input);
    void* const winners = argmax.defined() ? argmax.mutable_data_ptr() : nullptr;
    const cuda::BlockPlan plan =
        cuda::plan_block(problem, cuda::common_alignment(input, weight, bias, output), limits,
                         cuda::active_conv2d_policy());
    if (plan.fused) {
      const cuda::PlannedWorkspace workspace(plan.conv, input);
      cuda::check_launch(
          kOp,
          cuda::block_forward(problem, plan.conv, read_data(input), read_data(weight),
                              bias.defined() ? read_data(bias) : nullptr, output.mutable_data_ptr(),
                              winners, workspace.data(), scope.stream()));
      return;
    }
    const ConvArguments& conv = arguments.conv;
    const at::Tensor convolved =
        ops::conv2d_relu(input, weight, bias.defined() ? ops::OptionalTensor(bias) : std::nullopt,
                         conv.stride, conv.padding, conv.dilation, conv.groups)
            .contiguous(memory_format(problem.conv.layout));
    const auto pooling = cuda::plan_max_pool2d(
        problem.pool, cuda::common_alignment(convolved, output, argmax), limits);
    cuda::check_launch(
        kOp, cuda::max_pool2d_forward(problem.pool, pooling, read_data(convolved),
                                      output.mutable_data_ptr(), winners, scope.stream(), true));
  }
  static ops::TensorTriple backward(const Conv2dReluMaxPool2dProblem& problem,
                                    const BlockArguments& arguments, const at::Tensor& grad_output,
                                    const at::Tensor& input, const at::Tensor& weight,
                                    const at::Tensor& argmax, std::array<bool, 3> wanted) {
    const cuda::DeviceScope scope(input);
    const Conv2dProblem& conv = problem.conv;
    const at::Tensor dense = empty({conv.batch, conv.out_channels, conv.out_height, conv.out_width},
                                   input.scalar_type(), memory_format(conv.layout), input);
    const auto pooling = cuda::plan_max_pool2d(
        problem.pool, cuda::common_alignment(grad_output, argmax, dense), cuda::limits_of(input));
    cuda::check_launch(kOp, cuda::max_pool2d_backward(problem.pool, pooling, read_data(grad_output),
                                                      read_data(argmax), dense.mutable_data_ptr(),
                                                      scope.stream()));
    return ops::conv2d_backward(dense, input, weight, arguments.conv.stride, arguments.conv.padding,
                                arguments.conv.dilation, arguments.conv.groups, wanted);
  }

 private:
  static constexpr const char* kOp = "conv2d_relu_max_pool2d";
};

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CNNK_CUDA_DISPATCH_KEY, m) { BlockOperators<Cuda>::add_to(m); }

}  // namespace cnnkernels
