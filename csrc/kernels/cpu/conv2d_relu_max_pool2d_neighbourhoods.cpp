#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_relu_max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_relu_max_pool2d_neighbourhoods.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {

void conv2d_relu_max_pool2d_neighbourhoods_backward(const Conv2dReluMaxPool2dProblem& problem,
                                                    Isa isa, const ThreadPool& pool,
                                                    const void* grad_output, const void* input,
                                                    const void* weight, const void* argmax,
                                                    void* grad_input, void* grad_weight,
                                                    void* grad_bias) {
  CNNK_TIER_FUNCTION(isa, neighbourhood_backward)(problem, pool, grad_output, input, weight, argmax,
                                                  grad_input, grad_weight, grad_bias);
}

}  // namespace cnnkernels
