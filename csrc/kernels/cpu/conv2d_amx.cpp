#include "kernels/cpu/conv2d_amx.h"

#include "kernels/cpu/conv2d_direct.h"

#define CNNK_TIER_SOURCE "kernels/cpu/conv2d_amx.inl"
#include "kernels/cpu/amx_tier.h"

namespace cnnkernels {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

GridAxis grid_axis(const std::vector<AxisPass>& passes, int64_t source_size) {
  GridAxis axis = {passes.front().step, 0, 0, 0, 0, {}, {}};
  bool first = true;
  int64_t high = 0;
  for (const AxisPass& pass : passes) {
    GridPass grid_pass = {pass.first, pass.stride, pass.count, {}};
    axis.count = std::max(axis.count, pass.count);
    for (const AxisTap& tap : pass.taps) {
      const int64_t cell = floor_div(tap.source, axis.step);
      const int64_t residue = tap.source - cell * axis.step;
      const auto found = std::find(axis.residues.begin(), axis.residues.end(), residue);
      const size_t index = static_cast<size_t>(found - axis.residues.begin());
      if (found == axis.residues.end()) axis.residues.push_back(residue);
      grid_pass.taps.push_back({tap.kernel_index, index, cell});
      axis.low = first ? cell : std::min(axis.low, cell);
      high = first ? cell : std::max(high, cell);
      first = false;
    }
    axis.passes.push_back(std::move(grid_pass));
  }
  for (GridPass& pass : axis.passes) {
    for (GridTap& tap : pass.taps) tap.cell -= axis.low;
  }
  axis.extra = high - axis.low;
  axis.shared = axis.extra;
  for (const int64_t residue : axis.residues) {
    int64_t before = 0, after = 0;
    const int64_t cells = axis.count + axis.extra;
    const auto position = [&](int64_t cell) { return (cell + axis.low) * axis.step + residue; };
    while (before < axis.shared && position(before) < 0) ++before;
    while (after < axis.shared && position(cells - 1 - after) >= source_size) ++after;
    axis.shared = std::min(before, after);
  }
  return axis;
}

}  // namespace

int amx_parts(const Conv2dProblem& problem) {
  if (problem.dtype == DType::bfloat16) return 1;
  if (problem.dtype == DType::float16) return 2;
  return problem.precision == Float32Precision::highest ? 3
         : problem.precision == Float32Precision::high  ? 2
                                                        : 1;
}

Grid forward_grid(const Conv2dProblem& p) {
  return {grid_axis({forward_axis(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
                                  p.dilation_h)},
                    p.in_height),
          grid_axis({forward_axis(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left,
                                  p.dilation_w)},
                    p.in_width)};
}

Grid gradient_grid(const Conv2dProblem& p) {
  return {grid_axis(gradient_axis(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
                                  p.dilation_h),
                    p.out_height),
          grid_axis(gradient_axis(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left,
                                  p.dilation_w),
                    p.out_width)};
}

bool has_row_runs(const Conv2dProblem& problem) {
  // With more channels a tile is half full without it, and a copy costs more.
  constexpr int64_t kFewChannels = 16;
  return problem.groups == 1 && problem.in_channels <= kFewChannels && problem.kernel_width > 1 &&
         problem.dilation_w == 1;
}

int64_t bordered_rows(const Conv2dProblem& problem) {
  return (problem.out_height - 1) * problem.stride_h +
         (problem.kernel_height - 1) * problem.dilation_h + 1;
}

int64_t bordered_columns(const Conv2dProblem& problem) {
  return (problem.out_width - 1) * problem.stride_w + problem.kernel_width;
}

int64_t row_run_elements(const Conv2dProblem& problem) {
  // The last block and the last tile of a run read past the last row.
  const int64_t past = kAmxBlock * problem.stride_w * problem.in_channels + kAmxDepth;
  const int64_t rows = problem.batch * bordered_rows(problem);
  return round_up(rows * bordered_columns(problem) * problem.in_channels + past, kAmxDepth);
}

GridChunk grid_chunk(const Grid& grid, int64_t batch, int64_t position_bytes, int64_t bytes,
                     int threads) {
  const int64_t positions = std::max<int64_t>(1, bytes / std::max<int64_t>(1, position_bytes));
  const int64_t image = grid.positions(1, grid.rows.count);
  if (image > positions) {
    const int64_t rows = positions / grid.columns.pitch() - grid.rows.extra;
    const int64_t most = std::clamp<int64_t>(rows, 1, grid.rows.count);
    return {1, ceil_div(grid.rows.count, ceil_div(grid.rows.count, most))};
  }
  const int64_t most = std::min(positions / image, ceil_div(batch, threads));
  return {std::max<int64_t>(1, most), grid.rows.count};
}

int64_t amx_gradient_slices(const Conv2dProblem& problem, int64_t chunks) {
  constexpr int64_t kTasks = 16, kMostElements = 4 * 1024 * 1024;
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t elements =
      problem.out_channels * group_in * problem.kernel_height * problem.kernel_width;
  const int64_t ranges = problem.groups * ceil_div(group_in, kAmxBlock);
  const int64_t wanted = std::max<int64_t>(2, ceil_div(kTasks, ranges));
  return std::clamp<int64_t>(std::min(wanted, kMostElements / elements), 1,
                             std::max<int64_t>(1, chunks));
}

// Calls the function `name` for the problem's number of parts.
#if CNNK_HAS_AMX
#define CNNK_WITH_PARTS(problem, name, ...) \
  do {                                      \
    switch (amx_parts(problem)) {           \
      case 1:                               \
        return amx::name<1>(__VA_ARGS__);   \
      case 2:                               \
        return amx::name<2>(__VA_ARGS__);   \
      default:                              \
        return amx::name<3>(__VA_ARGS__);   \
    }                                       \
  } while (false)
#else
#define CNNK_WITH_PARTS(problem, name, ...) return false
#endif

bool conv2d_amx_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                        const ThreadPool& pool, const void* input, const void* weight,
                        const void* bias, void* output) {
  CNNK_WITH_PARTS(problem, forward, problem, plan, pool, input, weight, bias, output);
}

bool conv2d_amx_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* weight,
                               void* grad_input) {
  CNNK_WITH_PARTS(problem, input_gradient, problem, plan, pool, grad_output, weight, grad_input);
}

bool conv2d_amx_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                const ThreadPool& pool, const void* grad_output, const void* input,
                                void* grad_weight) {
  CNNK_WITH_PARTS(problem, weight_gradient, problem, plan, pool, grad_output, input, grad_weight);
}

}  // namespace cnnkernels
