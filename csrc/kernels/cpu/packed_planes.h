// Geometry of packed planes: how convolution and pooling lay out their source
// so that every vector load is contiguous.
//
// A packed plane is a copy of one channel of one image in the accumulator type,
// with the border written out and each row split into `phases` sub-rows:
// sub-row f holds the columns f, f + phases, f + 2*phases, … of the bordered
// row. With phases = the horizontal stride, output columns x, x+1, x+2, … read
// consecutive elements, whatever the stride, dilation, padding or layout.
#pragma once

#include <cstdint>
#include <vector>

namespace cnnkernels {

struct PackedPlanes {
  int64_t top, left;  // border rows above and columns left of the image
  int64_t rows;
  int64_t phases;
  int64_t row_length;  // elements of one sub-row

  int64_t pitch() const { return phases * row_length; }
  int64_t plane() const { return rows * pitch(); }
  // Where column `column` of the bordered row 0 lies.
  int64_t column_offset(int64_t column) const {
    return (column % phases) * row_length + column / phases;
  }
};

// Where the planes to pack come from; strides in elements.
struct PlaneSource {
  int64_t height, width;
  int64_t channel_stride, row_stride, column_stride;
};

// One multiplication of a convolution: offsets from the output's position in a
// packed plane, and in the weights of one pair of channels.
struct Tap {
  int64_t source;
  int64_t weight;
};

}  // namespace cnnkernels
