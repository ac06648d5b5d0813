#include "kernels/conv2d_relu_max_pool2d.h"

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_relu_max_pool2d.h"
#include "kernels/workspace.h"

namespace cnnkernels {

bool neighbourhoods_apply(const Conv2dReluMaxPool2dProblem& problem, Isa isa) {
  const Conv2dProblem& conv = problem.conv;
  const int64_t lanes = vector_bytes(isa) / accumulator_size(conv.dtype);
  return windows_are_quads(problem.pool) && conv.groups == 1 && conv.kernel_height == 3 &&
         conv.stride_h == 1 && conv.dilation_h == 1 && conv.dilation_w == 1 &&
         neighbourhood_length(conv) <= 3 * lanes;
}

namespace {

// Images whose convolution outputs are kept at a time: as many as a second-level
// cache holds, and at least one.
int64_t images_per_stage(const Conv2dProblem& conv) {
  constexpr int64_t kStageBytes = 1024 * 1024;
  const int64_t image =
      conv.out_channels * conv.out_height * conv.out_width * element_size(conv.dtype);
  return std::clamp<int64_t>(kStageBytes / std::max<int64_t>(1, image), 1,
                             std::max<int64_t>(1, conv.batch));
}

// A convolution whose cheapest forward is one that only it has.
bool stage_pays(const Conv2dReluMaxPool2dProblem& problem, Isa isa, int threads) {
  const ConvAlgorithm algorithm = plan_conv2d(problem.conv, isa, threads).algorithm;
  if (algorithm == ConvAlgorithm::direct) return false;
  return algorithm != ConvAlgorithm::outer_product || !windows_are_quads(problem.pool);
}

// Winners are few, at most one in a window, but each is multiplied alone, by runs
// of a patch that few channels do not fill; rows of windows multiply the outputs
// that did not win as well. Where channels are many, or patches large, the weights'
// totals leave the first-level cache, and a dense gradient has all products at the
// speed of the convolution.
BlockBackward choose_backward(const Conv2dReluMaxPool2dProblem& problem, Isa isa) {
  constexpr int64_t kManyChannels = 16;
  constexpr int64_t kLargePatch = 128;
  constexpr int64_t kWinnerCycles = 10;  // to find one, and its patch
  const Conv2dProblem& conv = problem.conv;
  const int64_t channels = conv.in_channels / conv.groups;
  const int64_t patch = channels * conv.kernel_height * conv.kernel_width;
  if (channels >= kManyChannels || patch >= kLargePatch) return BlockBackward::dense;
  if (!windows_are_quads(problem.pool) || problem.pool.outputs() == 0) {
    return BlockBackward::winners;
  }
  const int64_t lanes = vector_bytes(isa) / accumulator_size(conv.dtype);
  const int64_t vectors = ceil_div(problem.pool.out_width, lanes);
  const int64_t patch_vectors = conv.kernel_height * ceil_div(conv.kernel_width * channels, lanes);
  // Four products a tap and channel, two a cycle, of a vector of windows.
  const int64_t row_cycles = 2 * patch * vectors;
  const bool together = neighbourhoods_apply(problem, isa);
  const int64_t winner_cycles = kWinnerCycles + (together ? 0 : patch_vectors);
  if (row_cycles < winner_cycles * problem.pool.out_width) return BlockBackward::windows;
  return together ? BlockBackward::neighbourhoods : BlockBackward::winners;
}

void plan_backward(const Conv2dReluMaxPool2dProblem& problem, Isa isa,
                   Conv2dReluMaxPool2dPlan& plan) {
  plan.backward = plan.input_backward = choose_backward(problem, isa);
  if (plan.backward != BlockBackward::windows) return;
  plan.input_backward =
      neighbourhoods_apply(problem, isa) ? BlockBackward::neighbourhoods : BlockBackward::winners;
}

}  // namespace

Conv2dReluMaxPool2dPlan plan_block_forward(const Conv2dReluMaxPool2dProblem& problem,
                                           ConvAlgorithm algorithm, Isa isa, int threads) {
  const MaxPool2dProblem& window = problem.pool;
  Conv2dReluMaxPool2dPlan plan;
  static_cast<Conv2dPlan&>(plan) = plan_forward(problem.conv, algorithm, isa, threads);
  plan.pool_in_registers = windows_are_quads(window);
  plan.staged = false;
  plan_backward(problem, isa, plan);
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
  if (stage_pays(problem, isa, threads)) {
    Conv2dProblem stage = problem.conv;
    stage.batch = images_per_stage(problem.conv);
    Conv2dReluMaxPool2dPlan plan;
    static_cast<Conv2dPlan&>(plan) = plan_conv2d(stage, isa, threads);
    plan.workspace_bytes += stage.batch * stage.out_channels * stage.out_height * stage.out_width *
                            element_size(stage.dtype);
    plan.pool_in_registers = false;
    plan.staged = true;
    plan_backward(problem, isa, plan);
    return plan;
  }
  ConvAlgorithm algorithm = ConvAlgorithm::direct;
  if (windows_are_quads(problem.pool)) {
    algorithm =
        cheaper_forward(problem.conv, isa, problem.pool.out_height, problem.pool.out_width, 4);
  }
  return plan_block_forward(problem, algorithm, isa, threads);
}

namespace {

void staged_forward(const Conv2dReluMaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output,
                    void* argmax) {
  Conv2dProblem conv = problem.conv;
  MaxPool2dProblem window = problem.pool;
  conv.relu = true;
  const int64_t size = element_size(conv.dtype);
  const int64_t images = images_per_stage(problem.conv);
  const int64_t input_bytes = conv.in_channels * conv.in_height * conv.in_width * size;
  const int64_t stage_bytes = conv.out_channels * conv.out_height * conv.out_width * size;
  const int64_t outputs = window.channels * window.out_height * window.out_width;
  const int64_t argmax_bytes = outputs * (window.compact_argmax() ? 1 : 4);
  const Workspace stage(images * stage_bytes);
  const auto at = [](auto* data, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>,
                                    const char, char>;
    return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
  };
  for (int64_t n = 0; n < problem.conv.batch; n += images) {
    conv.batch = window.batch = std::min(images, problem.conv.batch - n);
    conv2d_forward(conv, isa, pool, at(input, n * input_bytes), weight, bias, stage.as<char>());
    max_pool2d_forward(window, isa, pool, stage.as<char>(), at(output, n * outputs * size),
                       at(argmax, n * argmax_bytes), true);
  }
}

}  // namespace

void conv2d_relu_max_pool2d_forward(const Conv2dReluMaxPool2dProblem& problem,
                                    const Conv2dReluMaxPool2dPlan& plan, const ThreadPool& pool,
                                    const void* input, const void* weight, const void* bias,
                                    void* output, void* argmax) {
  if (plan.staged) {
    return staged_forward(problem, plan.isa, pool, input, weight, bias, output, argmax);
  }
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

int64_t block_backward_scratch_bytes(const Conv2dReluMaxPool2dProblem& problem,
                                     const Conv2dReluMaxPool2dPlan& plan) {
  if (plan.backward != BlockBackward::dense) return 0;
  const Conv2dProblem& conv = problem.conv;
  return conv.batch * conv.out_channels * conv.out_height * conv.out_width *
         element_size(conv.dtype);
}

void conv2d_relu_max_pool2d_backward(const Conv2dReluMaxPool2dProblem& problem,
                                     const Conv2dReluMaxPool2dPlan& plan, const ThreadPool& pool,
                                     const void* grad_output, const void* input, const void* weight,
                                     const void* argmax, void* grad_input, void* grad_weight,
                                     void* grad_bias, void* scratch) {
  if (plan.backward == BlockBackward::dense) {
    max_pool2d_backward(problem.pool, plan.isa, pool, grad_output, argmax, scratch);
    return conv2d_backward(problem.conv, plan.isa, pool, scratch, input, weight, grad_input,
                           grad_weight, grad_bias);
  }
  if (plan.backward == BlockBackward::windows) {
    if (grad_weight != nullptr || grad_bias != nullptr) {
      conv2d_relu_max_pool2d_window_gradient(problem, plan.isa, pool, grad_output, input, argmax,
                                             grad_weight, grad_bias);
    }
    if (grad_input == nullptr) return;
    grad_weight = grad_bias = nullptr;
  }
  if (plan.input_backward == BlockBackward::neighbourhoods) {
    return conv2d_relu_max_pool2d_neighbourhoods_backward(problem, plan.isa, pool, grad_output,
                                                          input, weight, argmax, grad_input,
                                                          grad_weight, grad_bias);
  }
  conv2d_relu_max_pool2d_winners_backward(problem, plan.isa, pool, grad_output, input, weight,
                                          argmax, grad_input, grad_weight, grad_bias);
}

}  // namespace cnnkernels
