// Residue classes of a strided convolution's input gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/types.h"

namespace cnnkernels {

// The residue class `phase` of one axis: the input positions first,
// first + stride, … (count of them), the position of the first in packed
// coordinates, and the kernel indices that reach the class.
struct GradientPhase {
  int64_t first;
  int64_t count;
  int64_t packed_first;
  std::vector<int64_t> kernel_indices;
};

inline GradientPhase gradient_phase(int64_t phase, int64_t size, int64_t kernel, int64_t stride,
                                    int64_t pad, int64_t dilation) {
  GradientPhase result;
  const int64_t multiple = pad > phase ? ceil_div(pad - phase, stride) : 0;
  result.first = phase + multiple * stride - pad;
  result.count = result.first < size ? (size - 1 - result.first) / stride + 1 : 0;
  result.packed_first = multiple;
  for (int64_t r = 0; r < kernel; ++r) {
    if (r * dilation % stride == phase) result.kernel_indices.push_back(r);
  }
  return result;
}

// The border of the output's gradient that the input gradient reads. Input
// position i, counted from the border, is y = i + pad; kernel index r carries it
// to output (y - r*dilation) / stride = y/stride - r*dilation/stride (integer
// divisions; both remainders are equal within a phase).
struct GradientBorder {
  int64_t before;  // rows (columns) before the first
  int64_t size;    // with the border
};

inline GradientBorder gradient_border(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                                      int64_t dilation) {
  const int64_t before = (kernel - 1) * dilation / stride;
  return {before, before + (size - 1 + pad) / stride + 1};
}

}  // namespace cnnkernels
