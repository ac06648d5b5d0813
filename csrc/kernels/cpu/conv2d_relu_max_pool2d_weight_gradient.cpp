#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_relu_max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_relu_max_pool2d_weight_gradient.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void conv2d_relu_max_pool2d_window_gradient(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                            const ThreadPool& pool, const void* grad_output,
                                            const void* input, const void* argmax,
                                            void* grad_weight, void* grad_bias) {
  CNNK_TIER_FUNCTION(isa, window_gradient)(problem, pool, grad_output, input, argmax, grad_weight,
                                           grad_bias);
}

}  // namespace cnnkernels
