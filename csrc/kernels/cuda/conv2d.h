// 2-D convolution on a CUDA device. Problems are those of kernels/conv2d.h.
//
// Each pass of a convolution has a plan of its own, and runs by itself: forward, and the gradients
// of the input, of the weight and of the bias.
#pragma once

#include <string>

#include "kernels/conv2d_relu_max_pool2d.h"
#include "kernels/cuda/conv2d_kernels.h"

namespace cnnkernels::cuda {

enum class Conv2dPass : uint8_t { forward, input_gradient, weight_gradient, bias_gradient };

enum class Conv2dAlgorithm : uint8_t {
  aten,           // torch's own, where it was measured to be faster: the caller runs it
  direct,         // forward and input gradient: conv2d_direct.cu
  implicit_gemm,  // on tensor cores: conv2d_implicit_gemm.cu, conv2d_weight_gradient.cu
  depthwise,      // few channels a group: conv2d_depthwise.cu
  wgmma,          // by warpgroup products of 9.0: conv2d_wgmma.cu
  plain,          // weight gradient without tensor cores: conv2d_weight_gradient.cu
  sum,            // bias gradient: conv2d_bias_gradient.cu
};

inline const char* algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::aten:
      return "aten";
    case Conv2dAlgorithm::direct:
      return "direct";
    case Conv2dAlgorithm::implicit_gemm:
      return "implicit GEMM";
    case Conv2dAlgorithm::depthwise:
      return "depthwise";
    case Conv2dAlgorithm::wgmma:
      return "wgmma";
    case Conv2dAlgorithm::plain:
      return "plain";
    default:
      return "sum";
  }
}

// What plans may choose.
enum class Conv2dPolicy : uint8_t {
  automatic,  // the fastest, torch's included
  native,     // the fastest kernel
  // This one where it takes a pass, and otherwise the fastest kernel. Direct's weight gradient is
  // the plain one.
  direct,
  implicit_gemm,
  depthwise,
  wgmma,  // which has not run on a device yet, so that nothing else chooses it
};

// Its value of CNNKERNELS_CUDA_CONV2D: "auto", "native", "direct", "implicit_gemm", "depthwise" or
// "wgmma".
const char* policy_name(Conv2dPolicy policy);

struct Conv2dPolicyChoice {
  Conv2dPolicy policy;
  std::string note;  // why a forced choice could not be honoured; empty if it was
};

// The automatic policy, or the one that `forced` names.
Conv2dPolicyChoice choose_conv2d_policy(const char* forced);

// The process's policy: CNNKERNELS_CUDA_CONV2D's at the first call, or set_conv2d_policy's.
Conv2dPolicy active_conv2d_policy();

// The note of the first choice.
const std::string& conv2d_policy_note();

// For tests and measurements: plans everything that follows by `policy`.
void set_conv2d_policy(Conv2dPolicy policy);

// How a pass is computed. What an algorithm does not need is zero.
struct Conv2dPlan {
  Conv2dAlgorithm algorithm;
  float torch_ratio;  // aten: torch's time over that of the kernel
  bool measured;      // aten: and not estimated
  int64_t alignment;
  GemmChoice gemm;              // implicit_gemm: of the forward pass and the input gradient
  WeightGradientChoice weight;  // and of the weight gradient
  int parts;                    // gradients of the weight and of the bias
  int64_t workspace_bytes;
};

// Pure functions of their arguments, and part of builds with CUDA only: conv2d_plan.cu. alignment:
// bytes of which the addresses of all tensors of a pass are multiples, but for the workspace, which
// is aligned to kVectorBytes.
Conv2dAlgorithm choose_conv2d(const Conv2dProblem& problem, Conv2dPass pass,
                              const DeviceLimits& limits, Conv2dPolicy policy);
Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Conv2dPass pass, int64_t alignment,
                       const DeviceLimits& limits, Conv2dPolicy policy);

// Convolution, ReLU and pooling as one kernel, direct or implicit_gemm, or one after the other.
struct BlockPlan {
  bool fused;
  std::string reason;  // why they are not one
  Conv2dPlan conv;     // of the kernel that they are
};
BlockPlan plan_block(const Conv2dReluMaxPool2dProblem& block, int64_t alignment,
                     const DeviceLimits& limits, Conv2dPolicy policy);

// Run a plan that is not aten's. bias may be null. grad_weight has the problem's weight strides.
Error conv2d_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* input,
                     const void* weight, const void* bias, void* output, void* workspace,
                     Stream stream);
Error conv2d_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const void* grad_output, const void* weight, void* grad_input,
                            void* workspace, Stream stream);
Error conv2d_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                             const void* grad_output, const void* input, void* grad_weight,
                             void* workspace, Stream stream);
Error conv2d_bias_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const void* grad_output, void* grad_bias, void* workspace,
                           Stream stream);

// Whose windows that the ReLU clips have no winner. argmax, in bytes, may be null.
Error block_forward(const Conv2dReluMaxPool2dProblem& block, const Conv2dPlan& plan,
                    const void* input, const void* weight, const void* bias, void* output,
                    void* argmax, void* workspace, Stream stream);

}  // namespace cnnkernels::cuda
