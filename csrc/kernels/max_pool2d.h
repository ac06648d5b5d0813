// 2-D max pooling: the problem and the entry points.
//
// Semantics are torch's: a later element replaces the maximum only if it is
// greater, or if it is NaN; padding never wins; a window of -inf alone gives
// its first element inside of the image.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

namespace cnnkernels {

struct MaxPool2dProblem {
  int64_t batch;
  int64_t channels;
  int64_t in_height, in_width;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  DType dtype;
  Layout layout;

  int64_t window() const { return kernel_height * kernel_width; }
  // The argmax of a window is its tap r * kernel_width + s, or no_winner() where
  // a ReLU clips the winner, which then passes no gradient. One byte holds both
  // where the window has up to 255 taps; else they are int32.
  int64_t no_winner() const { return window(); }
  bool compact_argmax() const { return no_winner() < 256; }
  int64_t outputs() const { return batch * channels * out_height * out_width; }
};

// 2x2 windows at stride 2 inside of the image, of which no two share an element. (An axis
// with one output has its stride set to 1 on the way here, and is none.)
bool windows_are_quads(const MaxPool2dProblem& problem);

struct MaxPool2dPlan {
  const char* algorithm;
  Isa isa;
  int vector_lanes;
  int threads;            // 1: the call stays on its own thread
  bool quads;             // windows_are_quads, NCHW: kernels of their own
  bool shared_rows;       // the forward of 3x3 windows at stride 2, NCHW
  bool separable;         // maxima of rows first, then of these
  bool in_place;          // rows are read where they lie; NCHW
  int64_t rows_per_band;  // output rows of a task whose input stays in the cache; NCHW, separable
  bool gathers;           // the backward: gather, or scatter where too many windows overlap
  int64_t gradient_rows_per_band;  // input rows whose windows stay in the cache; NCHW
};

MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& problem, Isa isa, int threads);

struct InputPosition {
  int64_t y, x;
};

// From an argmax to the input element that won.
class WinnerPositions {
 public:
  explicit WinnerPositions(const MaxPool2dProblem& problem) : problem_(problem) {
    taps_.reserve(static_cast<size_t>(problem.window()));
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      for (int64_t s = 0; s < problem.kernel_width; ++s) {
        taps_.push_back(
            {r * problem.dilation_h - problem.pad_top, s * problem.dilation_w - problem.pad_left});
      }
    }
  }

  // Throws for the first tap of the window rows [y0, y1) that is neither of its window
  // nor no winner; tap_at(y, x) reads them.
  template <class TapAt>
  void check(int64_t y0, int64_t y1, TapAt&& tap_at) const {
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = 0; x < problem_.out_width; ++x) {
        const int64_t tap = static_cast<int64_t>(tap_at(y, x));
        if (tap != problem_.no_winner()) (*this)(y, x, tap);
      }
    }
  }

  // The input element that tap `tap` of window (y, x) is. Throws
  // std::invalid_argument if there is none: an argmax that is not this
  // problem's must not reach memory.
  InputPosition operator()(int64_t y, int64_t x, int64_t tap) const {
    if (tap < 0 || tap >= static_cast<int64_t>(taps_.size())) refuse(y, x, tap);
    const InputPosition& offset = taps_[static_cast<size_t>(tap)];
    const InputPosition in = {y * problem_.stride_h + offset.y, x * problem_.stride_w + offset.x};
    if (in.y < 0 || in.y >= problem_.in_height || in.x < 0 || in.x >= problem_.in_width) {
      refuse(y, x, tap);
    }
    return in;
  }

 private:
  [[noreturn]] static void refuse(int64_t y, int64_t x, int64_t tap) {
    throw std::invalid_argument("argmax holds " + std::to_string(tap) + " for window (" +
                                std::to_string(y) + ", " + std::to_string(x) +
                                "), which has no such element");
  }

  const MaxPool2dProblem& problem_;
  std::vector<InputPosition> taps_;
};

// Calls body with a value of the type in which an argmax is kept.
template <class Body>
void with_tap(const MaxPool2dProblem& problem, Body&& body) {
  if (problem.compact_argmax()) {
    body(uint8_t{});
  } else {
    body(int32_t{});
  }
}

// argmax may be null; else it is uint8_t* or int32_t*, as compact_argmax() says.
// `clips`: windows whose maximum is not positive have no winner, as those of a
// ReLU's result.
void max_pool2d_forward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                        const void* input, void* output, void* argmax, bool clips = false);

// Adds each output gradient to its window's winner, if it has one; writes all of
// grad_input.
void max_pool2d_backward(const MaxPool2dProblem& problem, Isa isa, const ThreadPool& pool,
                         const void* grad_output, const void* argmax, void* grad_input);

// values[i] = input at the winner of window i, or 0 if it has none: the derivative
// of the backward.
void max_pool2d_gather(const MaxPool2dProblem& problem, const ThreadPool& pool, const void* input,
                       const void* argmax, void* values);

// torch's indices: the winner's position y * in_width + x in its plane.
void max_pool2d_indices(const MaxPool2dProblem& problem, const ThreadPool& pool, const void* argmax,
                        int64_t* indices);

}  // namespace cnnkernels
