#include "kernels/max_pool2d.h"

#include <algorithm>

#include "kernels/cpu/max_pool2d.h"

namespace cnnkernels {

namespace {

// A row at stride 2 is split into even and odd columns as it is loaded.
bool deinterleaves(const MaxPool2dProblem& problem) {
  return problem.stride_w == 2 && problem.dilation_w == 1 && problem.kernel_width > 1;
}

int64_t columns_reached(const MaxPool2dProblem& problem) {
  return (problem.out_width - 1) * problem.stride_w +
         (problem.kernel_width - 1) * problem.dilation_w + 1;
}

// Whether a plane can be read where it lies: no column of a window lies outside.
bool reads_in_place(const MaxPool2dProblem& problem) {
  return problem.layout == Layout::nchw &&
         element_size(problem.dtype) == accumulator_size(problem.dtype) && problem.pad_left == 0 &&
         columns_reached(problem) <= problem.in_width &&
         (problem.stride_w == 1 || deinterleaves(problem));
}

// Whether comparisons of rows, which overlapping windows share, and of their
// maxima are fewer; each pass also costs as much as a comparison for what it keeps.
bool pays_in_two_passes(const MaxPool2dProblem& problem) {
  const int64_t new_rows = std::min(problem.stride_h, problem.kernel_height);
  const int64_t comparisons = problem.kernel_width * new_rows + problem.kernel_height + 2;
  return 5 * comparisons < 4 * problem.window();
}

// 3x3 windows at stride 2, of which at most a first row, a first column and a last
// row lie outside of the image. A window that has its middle row has another.
bool rows_can_be_shared(const MaxPool2dProblem& problem) {
  return problem.layout == Layout::nchw && problem.kernel_height == 3 &&
         problem.kernel_width == 3 && problem.stride_h == 2 && problem.stride_w == 2 &&
         problem.dilation_h == 1 && problem.dilation_w == 1 && problem.pad_top <= 1 &&
         problem.pad_left <= 1 && columns_reached(problem) - problem.pad_left <= problem.in_width &&
         2 * problem.out_height - problem.pad_top <= problem.in_height;
}

}  // namespace

bool windows_are_quads(const MaxPool2dProblem& problem) {
  return problem.kernel_height == 2 && problem.kernel_width == 2 && problem.stride_h == 2 &&
         problem.stride_w == 2 && problem.pad_top == 0 && problem.pad_left == 0 &&
         problem.dilation_h == 1 && problem.dilation_w == 1 &&
         2 * problem.out_height <= problem.in_height && 2 * problem.out_width <= problem.in_width;
}

PackedPlanes packed_pool_input(const MaxPool2dProblem& problem) {
  PackedPlanes packed;
  packed.top = problem.pad_top;
  packed.left = problem.pad_left;
  packed.phases = deinterleaves(problem) ? 1 : problem.stride_w;
  packed.rows = (problem.out_height - 1) * problem.stride_h +
                (problem.kernel_height - 1) * problem.dilation_h + 1;
  packed.row_length = ceil_div(columns_reached(problem), packed.phases);
  return packed;
}

MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& problem, Isa isa, int threads) {
  // A band of packed rows fills about half of a 32 KiB cache.
  constexpr int64_t kBandBytes = 16 * 1024;
  const int64_t size = accumulator_size(problem.dtype);
  const int64_t row_bytes = std::max<int64_t>(1, packed_pool_input(problem).pitch() * size);
  const int64_t overlap = (problem.kernel_height - 1) * problem.dilation_h + 1 - problem.stride_h;
  const int64_t bytes = problem.outputs() * problem.window() * element_size(problem.dtype);
  MaxPool2dPlan plan;
  plan.quads = problem.layout == Layout::nchw && windows_are_quads(problem);
  plan.shared_rows = rows_can_be_shared(problem);
  plan.in_place = plan.quads || plan.shared_rows || reads_in_place(problem);
  plan.separable = !plan.shared_rows && pays_in_two_passes(problem);
  plan.algorithm = plan.separable                   ? "separable"
                   : plan.quads                     ? "quads"
                   : plan.shared_rows               ? "shared rows"
                   : problem.layout == Layout::nhwc ? "channel vectors"
                   : plan.in_place                  ? "rows"
                                                    : "packed rows";
  plan.isa = isa;
  plan.vector_lanes = static_cast<int>(vector_bytes(isa) / size);
  plan.threads = bytes < kSerialBytes ? 1 : threads;
  // Of tall windows a band has as many rows as it shares with the next, so that no
  // row is packed more than twice.
  const int64_t least_rows = overlap / problem.stride_h;
  plan.rows_per_band = std::max((kBandBytes / row_bytes - overlap) / problem.stride_h, least_rows);
  if (plan.separable) {
    // Bands compute the maxima of the rows that they share anew, so they are long,
    // and in NHWC no more than the threads need.
    constexpr int64_t kChannelBlock = 64;
    const int64_t tasks = problem.batch * ceil_div(problem.channels, kChannelBlock);
    const int64_t bands = ceil_div(4 * int64_t{plan.threads}, std::max<int64_t>(1, tasks));
    if (problem.layout == Layout::nhwc) plan.rows_per_band = ceil_div(problem.out_height, bands);
    plan.rows_per_band = std::max({plan.rows_per_band, 4 * problem.kernel_height, least_rows});
  }
  plan.rows_per_band = std::clamp<int64_t>(plan.rows_per_band, 1, problem.out_height);
  // A gather compares each element with every window over it; a scatter takes as
  // long as two vectors' worth of comparisons.
  const int64_t overlapping = ceil_div(problem.kernel_height, problem.stride_h) *
                              ceil_div(problem.kernel_width, problem.stride_w);
  plan.gathers = overlapping <= 2 * plan.vector_lanes;
  const int64_t window_row_bytes = std::max<int64_t>(1, problem.out_width * (size + 1));
  plan.gradient_rows_per_band = std::clamp<int64_t>(
      std::max(kBandBytes / window_row_bytes * problem.stride_h, overlap), 1, problem.in_height);
  return plan;
}

void max_pool2d_forward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                        const void* input, void* output, void* argmax, bool clips) {
  const MaxPool2dPlan plan = plan_max_pool2d(problem, isa, pool.threads);
  const auto run = plan.quads         ? &max_pool2d_quads_forward
                   : plan.shared_rows ? &max_pool2d_shared_rows_forward
                                      : &max_pool2d_windows_forward;
  run(problem, plan, pool, input, output, argmax, clips);
}

void max_pool2d_backward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                         const void* grad_output, const void* argmax, void* grad_input) {
  const MaxPool2dPlan plan = plan_max_pool2d(problem, isa, pool.threads);
  const auto run = plan.quads     ? &max_pool2d_quads_backward
                   : plan.gathers ? &max_pool2d_gathered_backward
                                  : &max_pool2d_scattered_backward;
  run(problem, plan, pool, grad_output, argmax, grad_input);
}

}  // namespace cnnkernels
