#include "kernels/conv2d.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_outer_product.h"
#include "kernels/cpu/gradient_phase.h"

namespace cnnkernels {
namespace {

// What the tiles read should stay in the second-level cache of all threads.
constexpr int64_t kPackedChunkBytes = 512 * 1024;

// Cuts `rows` so that every thread gets several tasks when there are few
// (image, channel block) pairs.
int64_t rows_per_task(int64_t rows, int64_t other_tasks, int threads) {
  if (threads == 1) return rows;
  const int64_t wanted_tasks = 4 * int64_t{threads};
  const int64_t blocks = std::clamp<int64_t>(ceil_div(wanted_tasks, other_tasks), 1, rows);
  return ceil_div(rows, blocks);
}

// The plan of a direct pass that packs `packed_image` elements an image and gives
// `group_channels` channels of `rows` rows in each group.
Conv2dPlan direct_plan(const Conv2dProblem& problem, Isa isa, int threads, int64_t packed_image,
                       int64_t group_channels, int64_t rows) {
  Conv2dPlan plan;
  plan.algorithm = "direct";
  plan.isa = isa;
  plan.vector_lanes = static_cast<int>(vector_bytes(isa) / accumulator_size(problem.dtype));
  plan.threads = problem.multiply_adds() < kSerialMultiplyAdds ? 1 : threads;
  const int64_t image_bytes = std::max<int64_t>(1, packed_image * accumulator_size(problem.dtype));
  plan.images_per_chunk = std::clamp<int64_t>(plan.threads * kPackedChunkBytes / image_bytes, 1,
                                              std::max<int64_t>(1, problem.batch));
  plan.channels_per_task = std::min<int64_t>(group_channels, 24);
  const int64_t other_tasks =
      plan.images_per_chunk * problem.groups * ceil_div(group_channels, plan.channels_per_task);
  plan.rows_per_task = std::max<int64_t>(1, rows_per_task(rows, other_tasks, plan.threads));
  plan.in_place = false;
  plan.workspace_bytes = plan.images_per_chunk * image_bytes;
  return plan;
}

Conv2dPlan plan_input_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  const int64_t packed_plane =
      (problem.out_height + (problem.kernel_height - 1) * problem.dilation_h) *
      (problem.out_width + (problem.kernel_width - 1) * problem.dilation_w);
  return direct_plan(problem, isa, threads, problem.out_channels * packed_plane,
                     problem.in_channels / problem.groups,
                     ceil_div(problem.in_height, problem.stride_h));
}

Conv2dPlan plan_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  const int64_t packed_image =
      problem.in_channels * packed_input(problem, problem.stride_w).plane() +
      problem.out_channels * problem.out_height * (problem.out_width + vector_bytes(isa));
  return direct_plan(problem, isa, threads, packed_image, problem.out_channels / problem.groups,
                     problem.out_height);
}

// The same for outer products, whose tiles take all channels of a group, packed
// as panels of `steps` (input channel, tap) pairs.
Conv2dPlan outer_product_plan(const Conv2dProblem& problem, Isa isa, int threads,
                              int64_t packed_image, int64_t panels, int64_t rows) {
  Conv2dPlan plan = direct_plan(problem, isa, threads, packed_image, 1, rows);
  plan.algorithm = "outer product";
  plan.workspace_bytes += panels * accumulator_size(problem.dtype);
  return plan;
}

bool reads_in_place(const Conv2dProblem& problem) {
  return problem.dtype == DType::float32 || problem.dtype == DType::float64;
}

int64_t lanes_of(const Conv2dProblem& problem, Isa isa) {
  return vector_bytes(isa) / accumulator_size(problem.dtype);
}

int choice(const char* name) {
  const char* v = std::getenv(name);
  return v == nullptr ? -1 : std::atoi(v);
}

}  // namespace

Conv2dPlan plan_outer_product_forward(const Conv2dProblem& problem, Isa isa, int threads) {
  const PackedPlanes packed = packed_input(problem, 1);
  const bool in_place = reads_in_place(problem) && problem.pad_top == 0 && problem.pad_left == 0 &&
                        packed.rows <= problem.in_height && packed.row_length <= problem.in_width;
  const int64_t panels =
      problem.groups * round_up(problem.out_channels / problem.groups, lanes_of(problem, isa)) *
      (problem.in_channels / problem.groups) * problem.kernel_height * problem.kernel_width;
  Conv2dPlan plan =
      outer_product_plan(problem, isa, threads, in_place ? 0 : problem.in_channels * packed.plane(),
                         panels, problem.out_height);
  plan.in_place = in_place;
  return plan;
}

Conv2dPlan plan_outer_product_input_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  const GradientBorder border_h =
      gradient_border(problem.in_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                      problem.dilation_h);
  const GradientBorder border_w =
      gradient_border(problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                      problem.dilation_w);
  const bool in_place = reads_in_place(problem) && border_h.before == 0 && border_w.before == 0 &&
                        border_h.size <= problem.out_height && border_w.size <= problem.out_width;
  const int64_t panels =
      problem.groups * round_up(problem.in_channels / problem.groups, lanes_of(problem, isa)) *
      (problem.out_channels / problem.groups) * problem.kernel_height * problem.kernel_width;
  Conv2dPlan plan = outer_product_plan(
      problem, isa, threads, in_place ? 0 : problem.out_channels * border_h.size * border_w.size,
      panels, ceil_div(problem.in_height, problem.stride_h));
  plan.in_place = in_place;
  return plan;
}

Conv2dPlan plan_outer_product_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  Conv2dPlan plan = plan_outer_product_forward(problem, isa, threads);
  const int64_t gradient_image =
      problem.groups * round_up(problem.out_channels / problem.groups, lanes_of(problem, isa)) *
      problem.out_height * problem.out_width;
  const int64_t source_image =
      plan.in_place ? 0 : problem.in_channels * packed_input(problem, 1).plane();
  const bool in_place = plan.in_place;
  plan = outer_product_plan(problem, isa, threads, source_image + gradient_image, 0,
                            problem.out_height);
  plan.in_place = in_place;
  return plan;
}

PackedPlanes packed_input(const Conv2dProblem& problem, int64_t phases) {
  PackedPlanes packed;
  packed.top = problem.pad_top;
  packed.left = problem.pad_left;
  packed.phases = phases;
  packed.rows = (problem.out_height - 1) * problem.stride_h +
                (problem.kernel_height - 1) * problem.dilation_h + 1;
  const int64_t columns = (problem.out_width - 1) * problem.stride_w +
                          (problem.kernel_width - 1) * problem.dilation_w + 1;
  packed.row_length = ceil_div(columns, phases);
  return packed;
}

std::vector<Tap> forward_taps(const Conv2dProblem& problem, const PackedPlanes& packed,
                              int64_t weight_stride_r, int64_t weight_stride_s,
                              int64_t first_column) {
  std::vector<Tap> taps;
  taps.reserve(static_cast<size_t>(problem.kernel_height * problem.kernel_width));
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      taps.push_back({r * problem.dilation_h * packed.pitch() +
                          packed.column_offset(first_column + s * problem.dilation_w),
                      r * weight_stride_r + s * weight_stride_s});
    }
  }
  return taps;
}

PlaneSource plane_source(Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::nchw) return {height, width, height * width, width, 1};
  return {height, width, 1, width * channels, channels};
}

Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Isa isa, int threads) {
  Conv2dPlan plan = direct_plan(
      problem, isa, threads, problem.in_channels * packed_input(problem, problem.stride_w).plane(),
      problem.out_channels / problem.groups, problem.out_height);
  const bool accumulator_type = problem.dtype == DType::float32 || problem.dtype == DType::float64;
  const PackedPlanes packed = packed_input(problem, problem.stride_w);
  plan.in_place = accumulator_type && problem.layout == Layout::nchw && problem.stride_w == 1 &&
                  problem.pad_top == 0 && problem.pad_left == 0 &&
                  packed.rows <= problem.in_height && packed.row_length <= problem.in_width &&
                  problem.out_width >= plan.vector_lanes;
  if (plan.in_place) plan.workspace_bytes = 0;
  return plan;
}

void conv2d_forward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output) {
  if (choice("OPF") == 1) {
    conv2d_outer_product_forward(problem, plan_outer_product_forward(problem, isa, pool.threads),
                                 pool, input, weight, bias, output);
    return;
  }
  const Conv2dPlan plan = plan_conv2d(problem, isa, pool.threads);
  conv2d_direct_forward(problem, plan, pool, input, weight, bias, output);
}

void conv2d_backward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                     const void* grad_output, const void* input, const void* weight,
                     void* grad_input, void* grad_weight, void* grad_bias) {
  if (grad_input != nullptr && choice("OPI") == 1) {
    conv2d_outer_product_input_gradient(
        problem, plan_outer_product_input_gradient(problem, isa, pool.threads), pool, grad_output,
        weight, grad_input);
  } else if (grad_input != nullptr) {
    conv2d_direct_input_gradient(problem, plan_input_gradient(problem, isa, pool.threads), pool,
                                 grad_output, weight, grad_input);
  }
  if (grad_weight != nullptr && choice("OPW") == 1) {
    conv2d_outer_product_weight_gradient(
        problem, plan_outer_product_weight_gradient(problem, isa, pool.threads), pool, grad_output,
        input, grad_weight);
  } else if (grad_weight != nullptr) {
    conv2d_direct_weight_gradient(problem, plan_weight_gradient(problem, isa, pool.threads), pool,
                                  grad_output, input, grad_weight);
  }
  if (grad_bias != nullptr) {
    conv2d_bias_gradient(problem, isa, pool, grad_output, grad_bias);
  }
}

}  // namespace cnnkernels
