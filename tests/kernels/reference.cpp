#include "reference.h"

#include <cmath>
#include <limits>

namespace kernel_tests {

using cnnkernels::Conv2dProblem;
using cnnkernels::Conv2dReluMaxPool2dProblem;
using cnnkernels::MaxPool2dProblem;

namespace {

// Calls visit(input index or kOutside, weight index) for the products that make
// up output (n, k, y, x).
template <class Visit>
void for_each_product(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
                      int64_t n, int64_t k, int64_t y, int64_t x, Visit&& visit) {
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group = k / (problem.out_channels / problem.groups);
  for (int64_t c = 0; c < group_in; ++c) {
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      for (int64_t s = 0; s < problem.kernel_width; ++s) {
        const int64_t in_y = y * problem.stride_h + r * problem.dilation_h - problem.pad_top;
        const int64_t in_x = x * problem.stride_w + s * problem.dilation_w - problem.pad_left;
        const bool inside =
            in_y >= 0 && in_y < problem.in_height && in_x >= 0 && in_x < problem.in_width;
        visit(inside ? input.index(n, group * group_in + c, in_y, in_x) : kOutside,
              weight.index(k, c, r, s));
      }
    }
  }
}

template <class Visit>
void for_each_position(const Dims& shape, Visit&& visit) {
  for (int64_t n = 0; n < shape[0]; ++n) {
    for (int64_t c = 0; c < shape[1]; ++c) {
      for (int64_t y = 0; y < shape[2]; ++y) {
        for (int64_t x = 0; x < shape[3]; ++x) visit(n, c, y, x);
      }
    }
  }
}

Conv2dGradients zero_gradients(const Tensor& input, const Tensor& weight) {
  return {Tensor(input.shape), Tensor(weight.shape), Tensor({weight.shape[0], 1, 1, 1})};
}

// Adds the gradients that gradient `g` of output (n, k, y, x) brings.
void add_gradients(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
                   int64_t n, int64_t k, int64_t y, int64_t x, double g, Conv2dGradients& to) {
  to.bias[k] += g;
  for_each_product(problem, input, weight, n, k, y, x, [&](int64_t in, int64_t w) {
    to.weight[w] += g * (in == kOutside ? 0.0 : input[in]);
    if (in != kOutside) to.input[in] += g * weight[w];
  });
}

}  // namespace

Tensor conv2d(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
              const Tensor* bias) {
  Tensor output({problem.batch, problem.out_channels, problem.out_height, problem.out_width});
  for_each_position(output.shape, [&](int64_t n, int64_t k, int64_t y, int64_t x) {
    double sum = bias != nullptr ? (*bias)[k] : 0.0;
    for_each_product(problem, input, weight, n, k, y, x, [&](int64_t in, int64_t w) {
      if (in != kOutside) sum += input[in] * weight[w];
    });
    output[output.index(n, k, y, x)] = sum;
  });
  return output;
}

Conv2dGradients conv2d_gradients(const Conv2dProblem& problem, const Tensor& grad_output,
                                 const Tensor& input, const Tensor& weight) {
  Conv2dGradients gradients = zero_gradients(input, weight);
  for_each_position(grad_output.shape, [&](int64_t n, int64_t k, int64_t y, int64_t x) {
    add_gradients(problem, input, weight, n, k, y, x, grad_output[grad_output.index(n, k, y, x)],
                  gradients);
  });
  return gradients;
}

int64_t tap_position(const MaxPool2dProblem& problem, int64_t y, int64_t x, int64_t tap) {
  if (tap < 0 || tap >= problem.window()) return kOutside;
  const int64_t in_y =
      y * problem.stride_h - problem.pad_top + tap / problem.kernel_width * problem.dilation_h;
  const int64_t in_x =
      x * problem.stride_w - problem.pad_left + tap % problem.kernel_width * problem.dilation_w;
  if (in_y < 0 || in_y >= problem.in_height || in_x < 0 || in_x >= problem.in_width) {
    return kOutside;
  }
  return in_y * problem.in_width + in_x;
}

Pooled max_pool2d(const MaxPool2dProblem& problem, const Tensor& input) {
  const Dims shape = {problem.batch, problem.channels, problem.out_height, problem.out_width};
  Pooled pooled = {Tensor(shape), Tensor(shape)};
  for_each_position(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    double best = -std::numeric_limits<double>::infinity();
    int64_t winner = kOutside;
    for (int64_t tap = 0; tap < problem.window(); ++tap) {
      const int64_t position = tap_position(problem, y, x, tap);
      if (position == kOutside) continue;
      const double value = input[input.index(n, c, 0, 0) + position];
      if (winner == kOutside || value > best || std::isnan(value)) {
        best = value;
        winner = tap;
      }
    }
    const int64_t at = pooled.values.index(n, c, y, x);
    pooled.values[at] = best;
    pooled.taps[at] = static_cast<double>(winner);
  });
  return pooled;
}

std::vector<int64_t> winners(const MaxPool2dProblem& problem, const Tensor& taps) {
  const int64_t plane = problem.in_height * problem.in_width;
  std::vector<int64_t> positions;
  for_each_position(taps.shape, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const int64_t tap = static_cast<int64_t>(taps[taps.index(n, c, y, x)]);
    positions.push_back((n * problem.channels + c) * plane + tap_position(problem, y, x, tap));
  });
  return positions;
}

Tensor relu(const Tensor& input) {
  Tensor output = input;
  for (double& value : output.values) value = value <= 0 ? 0 : value;
  return output;
}

Conv2dGradients conv2d_relu_max_pool2d_gradients(const Conv2dReluMaxPool2dProblem& problem,
                                                 const Tensor& grad_output, const Tensor& input,
                                                 const Tensor& weight, const Pooled& pooled) {
  Conv2dGradients gradients = zero_gradients(input, weight);
  const std::vector<int64_t> positions = winners(problem.pool, pooled.taps);
  const int64_t width = problem.conv.out_width;
  const int64_t plane = problem.conv.out_height * width;
  for_each_position(grad_output.shape, [&](int64_t n, int64_t k, int64_t y, int64_t x) {
    const int64_t at = grad_output.index(n, k, y, x);
    if (pooled.values[at] <= 0 || grad_output[at] == 0) return;
    const int64_t winner = positions[static_cast<size_t>(at)] % plane;
    add_gradients(problem.conv, input, weight, n, k, winner / width, winner % width,
                  grad_output[at], gradients);
  });
  return gradients;
}

}  // namespace kernel_tests
