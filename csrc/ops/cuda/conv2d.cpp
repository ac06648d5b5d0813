// The convolution operators on CUDA: each pass by its own plan, ours or torch's.
#include "ops/conv2d.h"

#include "ops/cuda/conv2d.h"

namespace cnnkernels {
namespace {

[[maybe_unused]] const bool is_linked =
    (cuda_conv2d_planner() = {cuda::plan_conv2d, cuda::plan_block}).plan_conv2d != nullptr;

bool is_torchs(const Conv2dProblem& problem, cuda::Conv2dPass pass, const at::Tensor& tensor) {
  return cuda::choose_conv2d(problem, pass, cuda::limits_of(tensor),
                             cuda::active_conv2d_policy()) == cuda::Conv2dAlgorithm::aten;
}

struct PlannedPass {
  cuda::Conv2dPlan plan;
  cuda::PlannedWorkspace memory;

  template <class... Tensors>
  PlannedPass(const Conv2dProblem& problem, cuda::Conv2dPass pass, const at::Tensor& first,
              const Tensors&... others)
      : plan(cuda::plan_conv2d(problem, pass, cuda::common_alignment(first, others...),
                               cuda::limits_of(first), cuda::native_policy())),
        memory(plan, first) {}
  void* workspace() const { return memory.data(); }
};

struct Cuda : cuda::Allocation {
  static std::string not_native(const Conv2dProblem& problem) {
    return cuda::conv2d_not_native(problem);
  }
  static bool through_aten(const Conv2dProblem& problem, const at::Tensor& input) {
    return is_torchs(problem, cuda::Conv2dPass::forward, input);
  }
  static std::array<bool, 3> gradients_through_aten(const Conv2dProblem& problem,
                                                    const at::Tensor& input,
                                                    std::array<bool, 3> wanted) {
    using cuda::Conv2dPass;
    return {wanted[0] && is_torchs(problem, Conv2dPass::input_gradient, input),
            wanted[1] && is_torchs(problem, Conv2dPass::weight_gradient, input),
            wanted[2] && is_torchs(problem, Conv2dPass::bias_gradient, input)};
  }
  static void forward(const Conv2dProblem& problem, const at::Tensor& input,
                      const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& output) {
    const cuda::DeviceScope scope(input);
    const PlannedPass pass(problem, cuda::Conv2dPass::forward, input, weight, bias, output);
    cuda::check_launch(
        problem.relu ? "conv2d_relu" : "conv2d",
        cuda::conv2d_forward(problem, pass.plan, read_data(input), read_data(weight),
                             bias.defined() ? read_data(bias) : nullptr, output.mutable_data_ptr(),
                             pass.workspace(), scope.stream()));
  }
  static void backward(const Conv2dProblem& problem, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& grad_input, const at::Tensor& grad_weight,
                       const at::Tensor& grad_bias) {
    constexpr const char* op = "conv2d_backward";
    const cuda::DeviceScope scope(input);
    if (grad_input.defined()) {
      const PlannedPass pass(problem, cuda::Conv2dPass::input_gradient, grad_output, weight,
                             grad_input);
      cuda::check_launch(op, cuda::conv2d_input_gradient(
                                 problem, pass.plan, read_data(grad_output), read_data(weight),
                                 grad_input.mutable_data_ptr(), pass.workspace(), scope.stream()));
    }
    if (grad_weight.defined()) {
      const PlannedPass pass(problem, cuda::Conv2dPass::weight_gradient, grad_output, input,
                             grad_weight);
      cuda::check_launch(op, cuda::conv2d_weight_gradient(
                                 problem, pass.plan, read_data(grad_output), read_data(input),
                                 grad_weight.mutable_data_ptr(), pass.workspace(), scope.stream()));
    }
    if (grad_bias.defined()) {
      const PlannedPass pass(problem, cuda::Conv2dPass::bias_gradient, grad_output, grad_bias);
      cuda::check_launch(op, cuda::conv2d_bias_gradient(problem, pass.plan, read_data(grad_output),
                                                        grad_bias.mutable_data_ptr(),
                                                        pass.workspace(), scope.stream()));
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CNNK_CUDA_DISPATCH_KEY, m) { Conv2dOperators<Cuda>::add_to(m); }

}  // namespace cnnkernels
