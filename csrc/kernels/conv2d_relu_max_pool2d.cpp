#include "kernels/conv2d_relu_max_pool2d.h"

#include <algorithm>

#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_relu_max_pool2d.h"

namespace cnnkernels {

bool pools_in_registers(const MaxPool2dProblem& window) {
  return window.kernel_height == 2 && window.kernel_width == 2 && window.stride_h == 2 &&
         window.stride_w == 2 && window.pad_top == 0 && window.pad_left == 0 &&
         window.dilation_h == 1 && window.dilation_w == 1 &&
         2 * window.out_height <= window.in_height && 2 * window.out_width <= window.in_width;
}

Conv2dReluMaxPool2dPlan plan_block_forward(const Conv2dReluMaxPool2dProblem& problem,
                                           ConvAlgorithm algorithm, Isa isa, int threads) {
  const MaxPool2dProblem& window = problem.pool;
  Conv2dReluMaxPool2dPlan plan;
  static_cast<Conv2dPlan&>(plan) = plan_forward(problem.conv, algorithm, isa, threads);
  plan.pool_in_registers = pools_in_registers(window);
  if (algorithm == ConvAlgorithm::outer_product) {
    plan.rows_per_task =
        plan.weights_first ? window.out_height : std::max<int64_t>(1, plan.rows_per_task / 2);
    return plan;
  }
  // The direct block always packs: its phases are not the convolution's.
  plan.in_place = false;
  plan.workspace_bytes = plan.images_per_chunk * problem.conv.in_channels *
                         packed_input(problem.conv, problem.conv.stride_w).plane() *
                         accumulator_size(problem.conv.dtype);
  // A band of convolution rows of all its channels should fit in the cache.
  const int64_t row_bytes = plan.channels_per_task * problem.conv.out_width *
                            accumulator_size(problem.conv.dtype) * window.stride_h;
  const int64_t cached_rows = std::max<int64_t>(2, 64 * 1024 / std::max<int64_t>(1, row_bytes));
  const int64_t other_tasks =
      plan.images_per_chunk * problem.conv.groups *
      ceil_div(problem.conv.out_channels / problem.conv.groups, plan.channels_per_task);
  const int64_t blocks =
      plan.threads == 1 ? 1
                        : ceil_div(4 * int64_t{plan.threads}, std::max<int64_t>(1, other_tasks));
  plan.rows_per_task = std::max<int64_t>(1, ceil_div(window.out_height, blocks));
  if (!plan.pool_in_registers) plan.rows_per_task = std::min(plan.rows_per_task, cached_rows);
  return plan;
}

Conv2dReluMaxPool2dPlan plan_conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dProblem& problem,
                                                    Isa isa, int threads) {
  ConvAlgorithm algorithm = ConvAlgorithm::direct;
  if (pools_in_registers(problem.pool)) {
    algorithm =
        cheaper_forward(problem.conv, isa, problem.pool.out_height, problem.pool.out_width, 4);
  }
  return plan_block_forward(problem, algorithm, isa, threads);
}

void conv2d_relu_max_pool2d_forward(const Conv2dReluMaxPool2dProblem& problem,
                                    const Conv2dReluMaxPool2dPlan& plan, const ThreadPool& pool,
                                    const void* input, const void* weight, const void* bias,
                                    void* output, void* argmax) {
  const auto run = plan.algorithm == ConvAlgorithm::direct
                       ? conv2d_relu_max_pool2d_direct_forward
                       : conv2d_relu_max_pool2d_outer_product_forward;
  run(problem, plan, pool, input, weight, bias, output, argmax);
}

void conv2d_relu_max_pool2d_forward(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                    const ThreadPool& pool, const void* input, const void* weight,
                                    const void* bias, void* output, void* argmax) {
  conv2d_relu_max_pool2d_forward(problem, plan_conv2d_relu_max_pool2d(problem, isa, pool.threads),
                                 pool, input, weight, bias, output, argmax);
}

void conv2d_relu_max_pool2d_backward(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                                     const ThreadPool& pool, const void* grad_output,
                                     const void* input, const void* weight, const void* argmax,
                                     void* grad_input, void* grad_weight, void* grad_bias) {
  conv2d_relu_max_pool2d_winners_backward(problem, isa, pool, grad_output, input, weight, argmax,
                                          grad_input, grad_weight, grad_bias);
}

}  // namespace cnnkernels
