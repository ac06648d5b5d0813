#include "kernels/max_pool2d.h"

#define CNNK_TIER_SOURCE "kernels/cpu/max_pool2d_backward.inl"
#include "kernels/cpu/for_each_tier.h"

namespace cnnkernels {
namespace {

// Throws for an argmax that no pooling gives: a tap that the window has not, or that lies
// outside of the image.
template <class Tap>
void check_taps(const MaxPool2dProblem& problem, const ThreadPool& pool, const Tap* argmax) {
  using Unsigned = std::make_unsigned_t<Tap>;
  const WinnerPositions positions(problem);
  const bool nchw = problem.layout == Layout::nchw;
  const int64_t pixel = nchw ? 1 : problem.channels;
  const int64_t planes = nchw ? problem.channels : 1;
  const auto no_winner = static_cast<Unsigned>(problem.no_winner());
  const auto inside = [](int64_t i, int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                         int64_t dilation) {
    const int64_t first = i * stride - pad;
    return first >= 0 && first + (kernel - 1) * dilation < size;
  };
  // Outputs [x0, x1) of a row, one by one.
  const auto check_each = [&](const Tap* row, int64_t y, int64_t x0, int64_t x1) {
    for (int64_t i = x0 * pixel; i < x1 * pixel; ++i) {
      if (static_cast<Unsigned>(row[i]) != no_winner) {
        positions(y, i / pixel, static_cast<int64_t>(row[i]));
      }
    }
  };
  int64_t x0 = 0, x1 = problem.out_width;
  const auto column_inside = [&](int64_t x) {
    return inside(x, problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                  problem.dilation_w);
  };
  while (x0 < x1 && !column_inside(x0)) ++x0;
  while (x1 > x0 && !column_inside(x1 - 1)) --x1;
  const bool serial = problem.outputs() < kSerialBytes;
  parallel_for(pool, problem.batch * planes * problem.out_height, serial,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t y = task % problem.out_height;
                   const Tap* const row = argmax + task * problem.out_width * pixel;
                   if (!inside(y, problem.in_height, problem.kernel_height, problem.stride_h,
                               problem.pad_top, problem.dilation_h)) {
                     check_each(row, y, 0, problem.out_width);
                     continue;
                   }
                   check_each(row, y, 0, x0);
                   check_each(row, y, x1, problem.out_width);
                   // All taps of the others are inside of the image.
                   Unsigned most = 0;
                   for (int64_t i = x0 * pixel; i < x1 * pixel; ++i) {
                     most = std::max(most, static_cast<Unsigned>(row[i]));
                   }
                   if (most > no_winner) check_each(row, y, x0, x1);
                 }
               });
}

}  // namespace

void max_pool2d_backward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                         const void* grad_output, const void* argmax, void* grad_input) {
  with_tap(problem,
           [&](auto tap) { check_taps(problem, pool, static_cast<const decltype(tap)*>(argmax)); });
  CNNK_TIER_FUNCTION(isa, backward)(problem, pool, grad_output, argmax, grad_input);
}

}  // namespace cnnkernels
