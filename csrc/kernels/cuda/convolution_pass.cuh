// A pass on the device: which results a thread has, and where they read.
#pragma once

#include "kernels/cuda/convolution_pass.h"
#include "kernels/cuda/launch.cuh"

namespace cnnkernels::cuda {

// The phase that a tile belongs to; tiles are numbered through all phases.
__device__ inline const PassPhase& phase_of_tile(const ConvolutionPass& pass, int tile) {
  int phase = 0;
  while (phase + 1 < pass.phase_count && pass.phases[phase + 1].first_tile <= tile) ++phase;
  return pass.phases[phase];
}

// Result number `position` of a phase, images first: the source pixel from which its taps count,
// and where it is stored.
struct PassPosition {
  bool exists;
  int row, column;         // of the source, without a tap
  int64_t source, result;  // elements of channel 0 of the group: of the image, and of the pixel
};

__device__ inline PassPosition pass_position(const ConvolutionPass& pass, const PassPhase& phase,
                                             int position) {
  const int pixels = phase.rows * phase.columns;
  PassPosition at;
  at.exists = position < pass.images * pixels;
  const int image = at.exists ? position / pixels : 0;
  const int pixel = at.exists ? position % pixels : 0;
  const int i = pixel / phase.columns, j = pixel % phase.columns;
  at.row = i * pass.source_step_h;
  at.column = j * pass.source_step_w;
  at.source = image * pass.source_stride_n;
  at.result = image * pass.result_stride_n +
              (phase.first_row + i * pass.result_step_h) * pass.result_stride_h +
              (phase.first_column + j * pass.result_step_w) * pass.result_stride_w;
  return at;
}

__device__ inline bool tap_is_inside(const ConvolutionPass& pass, const PassPosition& at,
                                     PassTap tap) {
  return at.exists &&
         static_cast<unsigned>(at.row + tap.row) < static_cast<unsigned>(pass.source_height) &&
         static_cast<unsigned>(at.column + tap.column) < static_cast<unsigned>(pass.source_width);
}

__device__ inline int64_t tap_element(const ConvolutionPass& pass, const PassPosition& at,
                                      PassTap tap) {
  return at.source + (at.row + tap.row) * pass.source_stride_h +
         (at.column + tap.column) * pass.source_stride_w;
}

// Of the weights of a group, for result channel 0 and source channel 0.
__device__ inline int64_t tap_weight(const ConvolutionPass& pass, PassTap tap) {
  return tap.index / pass.kernel_width * pass.weight_stride_r +
         tap.index % pass.kernel_width * pass.weight_stride_s;
}

}  // namespace cnnkernels::cuda
