// What follows a max pooling's winners: the backward adds each output gradient
// to its winner, the gather reads there, and the indices name the place.
//
// Scalar and scattered, plane by plane, so one source serves every instruction
// set. 16-bit gradients are summed in float and rounded once.
#include <algorithm>
#include <type_traits>

#include "kernels/cpu/max_pool2d.h"
#include "kernels/workspace.h"

namespace cnnkernels {
namespace {

// Calls visit(output index, input index) for the winner of every window of one
// channel of one image, and none(output index) where there is no winner. Indices
// are in elements from the start of the image. Throws std::invalid_argument for
// an argmax that no window of the problem has.
template <class Tap, class Visit, class None>
void for_each_winner(const MaxPool2dProblem& problem, const WinnerPositions& positions,
                     const Tap* argmax, int64_t channel, Visit&& visit, None&& none) {
  const Tap no_winner = static_cast<Tap>(problem.no_winner());
  const bool nchw = problem.layout == Layout::nchw;
  const int64_t pixel = nchw ? 1 : problem.channels;
  const int64_t out_start = nchw ? channel * problem.out_height * problem.out_width : channel;
  const int64_t in_start = nchw ? channel * problem.in_height * problem.in_width : channel;
  for (int64_t y = 0; y < problem.out_height; ++y) {
    for (int64_t x = 0; x < problem.out_width; ++x) {
      const int64_t out = out_start + (y * problem.out_width + x) * pixel;
      if (argmax[out] == no_winner) {
        none(out);
        continue;
      }
      const InputPosition in = positions(y, x, static_cast<int64_t>(argmax[out]));
      visit(out, in_start + (in.y * problem.in_width + in.x) * pixel);
    }
  }
}

template <class T, class Tap>
void scatter(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan, const ThreadPool& pool,
             const void* grad_output_data, const void* argmax_data, void* grad_input_data) {
  using A = Accumulator<T>;
  const WinnerPositions positions(problem);
  const int64_t in_image = problem.channels * problem.in_height * problem.in_width;
  const int64_t out_image = problem.channels * problem.out_height * problem.out_width;
  // A task: some channels of one image.
  const int64_t block = problem.layout == Layout::nchw ? 1 : 16;
  const int64_t blocks = ceil_div(problem.channels, block);
  const int64_t pixels = problem.in_height * problem.in_width;
  const bool nchw = problem.layout == Layout::nchw;
  parallel_for(pool, problem.batch * blocks, plan.threads == 1, [&](int64_t begin, int64_t end) {
    constexpr bool sums_in_place = std::is_same_v<T, A>;
    const Workspace workspace(sums_in_place ? 1 : pixels * static_cast<int64_t>(sizeof(A)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks;
      const int64_t c0 = task % blocks * block;
      const int64_t count = std::min(block, problem.channels - c0);
      const T* const grad_output = static_cast<const T*>(grad_output_data) + n * out_image;
      const Tap* const argmax = static_cast<const Tap*>(argmax_data) + n * out_image;
      T* const grad_input = static_cast<T*>(grad_input_data) + n * in_image;
      if constexpr (sums_in_place) {
        if (nchw) {
          std::fill_n(grad_input + c0 * pixels, count * pixels, T{0});
        } else {
          for (int64_t i = 0; i < pixels; ++i) {
            std::fill_n(grad_input + i * problem.channels + c0, count, T{0});
          }
        }
        for (int64_t c = c0; c < c0 + count; ++c) {
          for_each_winner(
              problem, positions, argmax, c,
              [&](int64_t out, int64_t in) { grad_input[in] += grad_output[out]; }, [](int64_t) {});
        }
      } else {
        A* const sums = workspace.as<A>();
        for (int64_t c = c0; c < c0 + count; ++c) {
          std::fill_n(sums, pixels, A{0});
          const int64_t start = nchw ? c * pixels : c;
          const int64_t step = nchw ? 1 : problem.channels;
          for_each_winner(
              problem, positions, argmax, c,
              [&](int64_t out, int64_t in) {
                sums[(in - start) / step] += widen(grad_output[out]);
              },
              [](int64_t) {});
          for (int64_t i = 0; i < pixels; ++i) {
            grad_input[start + i * step] = narrow<T>(sums[i]);
          }
        }
      }
    }
  });
}

// Calls visit(n, channel) for every plane, in parallel.
template <class Visit>
void for_each_plane(const MaxPool2dProblem& problem, const ThreadPool& pool, const Visit& visit) {
  const bool serial = problem.outputs() * element_size(problem.dtype) < kSerialBytes;
  parallel_for(pool, problem.batch * problem.channels, serial, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      visit(plane / problem.channels, plane % problem.channels);
    }
  });
}

}  // namespace

void max_pool2d_scattered_backward(const MaxPool2dProblem& problem, const MaxPool2dPlan& plan,
                                   const ThreadPool& pool, const void* grad_output,
                                   const void* argmax, void* grad_input) {
  with_dtype(problem.dtype, [&](auto element) {
    with_tap(problem, [&](auto tap) {
      scatter<decltype(element), decltype(tap)>(problem, plan, pool, grad_output, argmax,
                                                grad_input);
    });
  });
}

void max_pool2d_gather(const MaxPool2dProblem& problem, const ThreadPool& pool, const void* input,
                       const void* argmax, void* values) {
  with_dtype(problem.dtype, [&](auto element) {
    with_tap(problem, [&](auto tap) {
      using T = decltype(element);
      using Tap = decltype(tap);
      const WinnerPositions positions(problem);
      const int64_t in_image = problem.channels * problem.in_height * problem.in_width;
      const int64_t out_image = problem.channels * problem.out_height * problem.out_width;
      for_each_plane(problem, pool, [&](int64_t n, int64_t channel) {
        const T* const from = static_cast<const T*>(input) + n * in_image;
        T* const to = static_cast<T*>(values) + n * out_image;
        for_each_winner(
            problem, positions, static_cast<const Tap*>(argmax) + n * out_image, channel,
            [&](int64_t out, int64_t in) { to[out] = from[in]; },
            [&](int64_t out) { to[out] = T{}; });
      });
    });
  });
}

void max_pool2d_indices(const MaxPool2dProblem& problem, const ThreadPool& pool, const void* argmax,
                        int64_t* indices) {
  with_tap(problem, [&](auto tap) {
    using Tap = decltype(tap);
    const WinnerPositions positions(problem);
    const int64_t out_image = problem.channels * problem.out_height * problem.out_width;
    const bool nchw = problem.layout == Layout::nchw;
    for_each_plane(problem, pool, [&](int64_t n, int64_t channel) {
      const int64_t start = nchw ? channel * problem.in_height * problem.in_width : channel;
      const int64_t pixel = nchw ? 1 : problem.channels;
      int64_t* const to = indices + n * out_image;
      for_each_winner(
          problem, positions, static_cast<const Tap*>(argmax) + n * out_image, channel,
          [&](int64_t out, int64_t in) { to[out] = (in - start) / pixel; },
          [](int64_t) { throw std::invalid_argument("argmax holds a window without a winner"); });
    });
  });
}

}  // namespace cnnkernels
