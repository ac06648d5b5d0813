// The pooling operators on CUDA.
#include "kernels/cuda/max_pool2d.h"

#include "ops/cuda/device.h"
#include "ops/max_pool2d.h"

namespace cnnkernels {
namespace {

struct Cuda : cuda::Allocation {
  static std::string not_native(const MaxPool2dProblem& problem) {
    return cuda::max_pool2d_not_native(problem);
  }
  static void forward(const MaxPool2dProblem& problem, const at::Tensor& input,
                      const at::Tensor& output, const at::Tensor& argmax) {
    const cuda::DeviceScope scope(input);
    const auto plan = cuda::plan_max_pool2d(problem, cuda::common_alignment(input, output, argmax),
                                            cuda::limits_of(input));
    cuda::check_launch("max_pool2d",
                       cuda::max_pool2d_forward(
                           problem, plan, read_data(input), output.mutable_data_ptr(),
                           argmax.defined() ? argmax.mutable_data_ptr() : nullptr, scope.stream()));
  }
  static void backward(const MaxPool2dProblem& problem, const at::Tensor& grad_output,
                       const at::Tensor& argmax, const at::Tensor& grad_input) {
    const cuda::DeviceScope scope(grad_output);
    const auto plan =
        cuda::plan_max_pool2d(problem, cuda::common_alignment(grad_output, argmax, grad_input),
                              cuda::limits_of(grad_output));
    cuda::check_launch(
        "max_pool2d_backward",
        cuda::max_pool2d_backward(problem, plan, read_data(grad_output), read_data(argmax),
                                  grad_input.mutable_data_ptr(), scope.stream()));
  }
  static void gather(const MaxPool2dProblem& problem, const at::Tensor& input,
                     const at::Tensor& argmax, const at::Tensor& values) {
    const cuda::DeviceScope scope(input);
    const auto plan =
        cuda::plan_max_pool2d(problem, cuda::common_alignment(input), cuda::limits_of(input));
    cuda::check_launch("max_pool2d_gather",
                       cuda::max_pool2d_gather(problem, plan, read_data(input), read_data(argmax),
                                               values.mutable_data_ptr(), scope.stream()));
  }
  static void indices(const MaxPool2dProblem& problem, const at::Tensor& argmax,
                      const at::Tensor& indices) {
    const cuda::DeviceScope scope(argmax);
    const auto plan =
        cuda::plan_max_pool2d(problem, cuda::common_alignment(argmax), cuda::limits_of(argmax));
    cuda::check_launch("max_pool2d_with_indices",
                       cuda::max_pool2d_indices(problem, plan, read_data(argmax),
                                                static_cast<int64_t*>(indices.mutable_data_ptr()),
                                                scope.stream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CNNK_CUDA_DISPATCH_KEY, m) { MaxPool2dOperators<Cuda>::add_to(m); }

}  // namespace cnnkernels
