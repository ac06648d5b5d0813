// One axis of a convolution: which source positions a destination position
// reads. The same for the forward pass, whose source is the input, and for the
// residue classes of the input gradient, whose source is the output's gradient.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/types.h"

namespace cnnkernels {

// Destination j reads source j*step + `source` through this kernel index, for j
// in [begin, end): outside lies the border.
struct AxisTap {
  int64_t kernel_index;
  int64_t source;
  int64_t begin, end;
};

// Destinations [begin, end), which all read the same taps.
struct AxisSegment {
  int64_t begin, end;
  std::vector<AxisTap> taps;
};

// The destinations first, first + stride, … (count of them), by their number j.
struct AxisPass {
  int64_t first, stride, count;
  int64_t step;  // of the source, from j to j + 1
  std::vector<AxisTap> taps;
  std::vector<AxisSegment> segments;  // cover [0, count) in order
};

inline void cut_into_segments(AxisPass& pass) {
  std::vector<int64_t> cuts = {0, pass.count};
  for (const AxisTap& tap : pass.taps) {
    cuts.push_back(tap.begin);
    cuts.push_back(tap.end);
  }
  std::sort(cuts.begin(), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    if (cuts[i] == cuts[i + 1]) continue;
    AxisSegment segment = {cuts[i], cuts[i + 1], {}};
    for (const AxisTap& tap : pass.taps) {
      if (tap.begin <= segment.begin && segment.end <= tap.end) segment.taps.push_back(tap);
    }
    pass.segments.push_back(std::move(segment));
  }
}

inline AxisPass forward_axis(int64_t in_size, int64_t out_size, int64_t kernel, int64_t stride,
                             int64_t pad, int64_t dilation) {
  AxisPass pass = {0, 1, out_size, stride, {}, {}};
  for (int64_t r = 0; r < kernel; ++r) {
    const int64_t source = r * dilation - pad;
    const int64_t begin = source < 0 ? std::min(ceil_div(-source, stride), out_size) : 0;
    const int64_t end = in_size - source > 0 ? ceil_div(in_size - source, stride) : 0;
    pass.taps.push_back({r, source, begin, std::clamp(end, begin, out_size)});
  }
  cut_into_segments(pass);
  return pass;
}

// Input position i gets output (i + pad - r*dilation) / stride where that is a
// whole number; the positions i of one residue class have the same r.
inline std::vector<AxisPass> gradient_axis(int64_t in_size, int64_t out_size, int64_t kernel,
                                           int64_t stride, int64_t pad, int64_t dilation) {
  std::vector<AxisPass> passes;
  for (int64_t phase = 0; phase < std::min(stride, in_size); ++phase) {
    AxisPass pass = {phase, stride, ceil_div(in_size - phase, stride), 1, {}, {}};
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t distance = phase + pad - r * dilation;
      if (distance % stride != 0) continue;
      const int64_t source = distance / stride;
      const int64_t begin = std::clamp<int64_t>(-source, 0, pass.count);
      pass.taps.push_back({r, source, begin, std::clamp(out_size - source, begin, pass.count)});
    }
    cut_into_segments(pass);
    passes.push_back(std::move(pass));
  }
  return passes;
}

}  // namespace cnnkernels
