// What follows a max pooling's winners: the gather reads there, and the indices name the
// place.
//
// Scalar and scattered, plane by plane, so one source serves every instruction set.
#include "kernels/max_pool2d.h"

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
