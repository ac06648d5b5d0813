// The convolution that a plan names.
#include "kernels/cuda/conv2d.h"

namespace cnnkernels::cuda {
namespace {

// What the forward pass, the input gradient and the block share; the pool is the block's, or null.
Error run_pass(const Conv2dProblem& problem, const Conv2dPlan& plan, const ConvolutionPass& pass,
               const void* source, const void* weight, const void* bias, void* result, bool relu,
               const MaxPool2dProblem* pool, void* argmax, void* workspace, Stream stream) {
  switch (plan.algorithm) {
    case Conv2dAlgorithm::implicit_gemm:
      return implicit_gemm_pass(problem.dtype, plan.gemm, pass, source, weight, bias, result, relu,
                                pool, argmax, workspace, stream);
    case Conv2dAlgorithm::wgmma:
      return wgmma_pass(problem.dtype, pass, source, weight, bias, result, relu, workspace, stream);
    case Conv2dAlgorithm::depthwise:
      return depthwise_pass(problem.dtype, pass, source, weight, bias, result, relu, stream);
    default:
      return direct_pass(problem.dtype, pass, source, weight, bias, result, relu, plan.alignment,
                         pool, argmax, stream);
  }
}

}  // namespace

Error conv2d_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* input,
                     const void* weight, const void* bias, void* output, void* workspace,
                     Stream stream) {
  return run_pass(problem, plan, forward_pass(problem), input, weight, bias, output, problem.relu,
                  nullptr, nullptr, workspace, stream);
}

Error conv2d_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const void* grad_output, const void* weight, void* grad_input,
                            void* workspace, Stream stream) {
  return run_pass(problem, plan, input_gradient_pass(problem), grad_output, weight, nullptr,
                  grad_input, false, nullptr, nullptr, workspace, stream);
}

Error conv2d_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                             const void* grad_output, const void* input, void* grad_weight,
                             void* workspace, Stream stream) {
  const ConvolutionPass pass = forward_pass(problem);
  switch (plan.algorithm) {
    case Conv2dAlgorithm::implicit_gemm:
      return weight_gradient_gemm(problem.dtype, plan.weight, pass, plan.parts, grad_output, input,
                                  grad_weight, workspace, stream);
    case Conv2dAlgorithm::depthwise:
      return depthwise_weight_gradient(problem.dtype, pass, plan.parts, grad_output, input,
                                       grad_weight, workspace, stream);
    default:
      return weight_gradient_plain(problem.dtype, pass, plan.parts, grad_output, input, grad_weight,
                                   workspace, stream);
  }
}

Error conv2d_bias_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const void* grad_output, void* grad_bias, void* workspace,
                           Stream stream) {
  return bias_gradient(problem, plan.parts, grad_output, grad_bias, workspace, stream);
}

Error block_forward(const Conv2dReluMaxPool2dProblem& block, const Conv2dPlan& plan,
                    const void* input, const void* weight, const void* bias, void* output,
                    void* argmax, void* workspace, Stream stream) {
  return run_pass(block.conv, plan, forward_pass(block.conv), input, weight, bias, output, true,
                  &block.pool, argmax, workspace, stream);
}

}  // namespace cnnkernels::cuda
