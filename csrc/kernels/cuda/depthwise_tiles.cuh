// What the kernels of depthwise tiles share: which taps of a tile meet which results, and how a row
// of the source is read.
//
// A thread makes a tile of neighbouring results. It goes over the source rows below its tile once:
// a row is read, widened, and multiplied by all taps that meet it, in registers. Bounds are tested
// when elements are read, a row's and a column's alike; what is outside is zero.
#pragma once

#include <type_traits>

#include "kernels/cuda/depthwise_tiles.h"
#include "kernels/cuda/elements.cuh"

namespace cnnkernels::cuda {

struct FirstResult {
  int y, x;
};

// A tile of kHeight x kWidth results. Window row i is the source row source(first result) + i.
template <int kKernelSize, int kStep, bool kIsTransposed, int kTileHeight, int kTileWidth>
struct Tile {
  static constexpr int kKernel = kKernelSize, kSourceStep = kStep;
  static constexpr bool kTransposed = kIsTransposed;
  static constexpr int kHeight = kTileHeight, kWidth = kTileWidth;
  static constexpr int kPad = (kKernel - 1) / 2;
  // Transposed, result 2 i + a meets tap a + kPad - 2 d in source pixel i + d.
  static constexpr int kFirst = -((kKernel - 1 - kPad) / 2), kLast = (1 + kPad) / 2;

  static constexpr int window(int results) {
    return kTransposed ? results / 2 + kLast - kFirst : (results - 1) * kStep + kKernel;
  }
  static constexpr int kRows = window(kHeight), kColumns = window(kWidth);
  // Of window row `row`, the tap that meets result `result`, or a number that is no tap's.
  static constexpr int tap(int row, int result) {
    return kTransposed ? result % 2 + kPad - 2 * (row + kFirst - result / 2) : row - result * kStep;
  }
  // Whether no later row of the window meets a result.
  static constexpr bool is_last(int row, int result) {
    return is_tap(tap(row, result)) && (row + 1 == kRows || !is_tap(tap(row + 1, result)));
  }
  static constexpr bool is_tap(int tap) { return tap >= 0 && tap < kKernel; }
  // The first result of tile number `tile` of a plane.
  __device__ static FirstResult first_result(const DepthwiseTiles& g, uint32_t tile) {
    const uint32_t row = g.row_tiles.quotient(tile);
    return {static_cast<int>(row) * kHeight,
            static_cast<int>(tile - row * g.row_tiles.value) * kWidth};
  }
  // The source pixel, of a row or a column, where the window below a result begins.
  __device__ static int source(int result, int first) {
    return kTransposed ? result / 2 + kFirst : result * kStep + first;
  }
};

// Rows of a window that are read ahead of the one that is multiplied: a multiprocessor then waits
// for 30 KiB or more.
template <class Tile, class Row>
constexpr int kRowsAhead = Row::kChannels > 1 ? 2 : 3;

constexpr int power_of_two(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

// Neighbours as they lie in memory: of 16 bits two are a register, and one is half of it.
template <class T, int kCount>
class Packed {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));

 public:
  __device__ void read(const T* elements, uint32_t exists) {
    load_or_zero<kBytes>(elements, exists, words_);
  }
  __device__ Accumulator<T> at(int i) const {
    if constexpr (sizeof(T) == 2) {
      return to_accumulator<T>(words_[i / 2], i % 2 != 0);
    } else {
      T element;
      memcpy(&element, &words_[i], sizeof element);
      return element;
    }
  }

 private:
  uint32_t words_[words_of(kBytes)] = {};
};

// A row of a plane where the pixels of a tile are one access, and its neighbours on either side are
// few, whole vectors that lie inside of the image or outside.
template <class T, class Tile, int kOwn>
class PlaneRow {
  static constexpr int kLeft = Tile::kTransposed ? -Tile::kFirst : Tile::kPad;
  static constexpr int kRight = Tile::kColumns - kLeft - kOwn;
  static constexpr int vector_width(int columns) {
    return power_of_two(columns) < kOwn ? power_of_two(columns) : kOwn;
  }
  static constexpr int kLeftWidth = vector_width(kLeft), kRightWidth = vector_width(kRight);
  static_assert(kLeft <= kLeftWidth && kRight <= kRightWidth);

 public:
  static constexpr int kChannels = 1;
  static constexpr bool kWhole = true;  // all results of a tile's row exist

  class Place {
   public:
    __device__ Place(int first_result, int, int, int source_width)
        : column_(Tile::kTransposed ? first_result / 2 : first_result * Tile::kSourceStep),
          has_left_(column_ > 0),
          has_right_(column_ + kOwn < source_width) {}

   private:
    friend class PlaneRow;
    int column_;
    bool has_left_, has_right_;
  };

  __device__ static int first_element(const Place& place) { return place.column_; }
  // `elements` is the first.
  __device__ void read(const Place& place, const T* elements, bool inside) {
    own_.read(elements, inside);
    if constexpr (kLeft > 0) left_.read(elements - kLeftWidth, inside && place.has_left_);
    if constexpr (kRight > 0) right_.read(elements + kOwn, inside && place.has_right_);
  }
  __device__ Accumulator<T> at(int column, int) const {
    const int own = column - kLeft;
    return own < 0       ? left_.at(kLeftWidth + own)
           : own >= kOwn ? right_.at(own - kOwn)
                         : own_.at(own);
  }

 private:
  Packed<T, kOwn> own_;
  Packed<T, kLeftWidth> left_;
  Packed<T, kRightWidth> right_;
};

// A row of pixels of kVector channels, each an access of its own: of NHWC, and of planes that are
// not aligned.
template <class T, class Tile, int kVector>
class PixelRow {
 public:
  static constexpr int kChannels = kVector;
  static constexpr bool kWhole = false;

  // The columns of a window that are inside of the image are bits of a mask.
  class Place {
   public:
    __device__ Place(int first_result, int first_column, int pixel_stride, int source_width)
        : column_(Tile::source(first_result, first_column)), stride_(pixel_stride), columns_(0) {
#pragma unroll
      for (int i = 0; i < Tile::kColumns; ++i) {
        if (static_cast<unsigned>(column_ + i) < static_cast<unsigned>(source_width)) {
          columns_ |= 1u << i;
        }
      }
    }

   private:
    friend class PixelRow;
    int column_, stride_;
    uint32_t columns_;
  };

  __device__ static int first_element(const Place& place) { return place.column_ * place.stride_; }
  __device__ void read(const Place& place, const T* elements, bool inside) {
    const uint32_t columns = inside ? place.columns_ : 0;
#pragma unroll
    for (int i = 0; i < Tile::kColumns; ++i) {
      pixels_[i].read(elements + i * place.stride_, columns & 1u << i);
    }
  }
  __device__ Accumulator<T> at(int column, int channel) const {
    return pixels_[column].at(channel);
  }

 private:
  Packed<T, kVector> pixels_[Tile::kColumns];
};

// Calls body(i, values) for each row i of the window below a tile, with its elements widened. Rows
// are read some turns before that.
template <class T, class Tile, class Row, class Body>
__device__ inline void for_each_row(const typename Row::Place& place, const T* source,
                                    int row_stride, int first_row, int source_height, Body&& body) {
  constexpr int kAhead = kRowsAhead<Tile, Row>;
  Row rows[kAhead];
  const T* next = source + int64_t{first_row} * row_stride + Row::first_element(place);
  const auto read = [&](int i) {
    rows[i % kAhead].read(
        place, next, static_cast<unsigned>(first_row + i) < static_cast<unsigned>(source_height));
    next += row_stride;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read(i);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    Accumulator<T> values[Tile::kColumns][Row::kChannels];
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
#pragma unroll
      for (int v = 0; v < Row::kChannels; ++v) values[j][v] = rows[i % kAhead].at(j, v);
    }
    if (i + kAhead < Tile::kRows) read(i + kAhead);
    body(i, values);
  }
}

}  // namespace cnnkernels::cuda
